"""Environments of strangers: what is imported, how the factory is called, prompts, targets, steps."""

import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from flash.environments.loading import LocalEnvironment
from flash.environments.protocol import EpisodeStart, SFTTarget
from flash.errors import InvalidInput, UserCodeError

Load = Callable[..., LocalEnvironment]

TRAIN = {"dataset/train.jsonl": '{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n'}
CLASS = """
    import random
    from freesolo.environments import EnvironmentMultiTurn, EnvironmentSingleTurn, EnvironmentStepResult, RewardResult

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, response_text):
            return RewardResult(score=1.0)
"""
MULTI = """
    import random
    from freesolo.environments import EnvironmentMultiTurn, EnvironmentStepResult, RewardResult

    class Env(EnvironmentMultiTurn):
        def start_episode(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def max_episode_turns(self, example):
            return 3

        def step_episode(self, example, messages, assistant_response):
            assert messages[-1] == {"role": "assistant", "content": assistant_response}
            BODY

        def score_episode(self, example, episode):
            return RewardResult(score=1.0)

    def load_environment():
        return Env()
"""


def environment_code(method: str = "", factory: str = "def load_environment():\n    return Env()") -> str:
    return textwrap.dedent(CLASS) + textwrap.indent(textwrap.dedent(method), "    ") + f"\n\n{factory}\n"


# --- import and factory -----------------------------------------------------------------------------


def test_sibling_modules_and_sidecar_files_are_found(load: Load) -> None:
    code = environment_code(
        "def start_episode(self, example, prompt_text):\n"
        "    import later\n"
        "    text = open(__file__.replace('environment.py', 'side.txt')).read()\n"
        "    return [{'role': 'user', 'content': helpers.shout(example.input) + text + later.MARK}]",
        "import helpers\ndef load_environment():\n    return Env()",
    )
    files = {"helpers.py": "def shout(t): return t.upper()", "later.py": "MARK = '!'", "side.txt": "?", **TRAIN}
    assert load(files, code=code).start("train", [0], seed=0)[0].messages[0]["content"] == "A?!"


def test_a_second_package_in_the_process_gets_its_own_modules(load: Load) -> None:
    code = environment_code(
        "def start_episode(self, example, prompt_text):\n    return [{'role': 'user', 'content': helpers.NAME}]",
        "import helpers\ndef load_environment():\n    return Env()",
    )
    first = load({"helpers.py": "NAME = 'first'", **TRAIN}, code=code)
    second = load({"helpers.py": "NAME = 'second'", **TRAIN}, code=code)
    assert second.start("train", [0], seed=0)[0].messages[0]["content"] == "second"
    assert first.start("train", [0], seed=0)[0].messages[0]["content"] == "first"


def test_close_leaves_the_interpreter_as_it_was(load: Load) -> None:
    path = list(sys.path)
    load(
        {"helpers.py": "", **TRAIN},
        code=environment_code(factory="import helpers\ndef load_environment(): return Env()"),
    ).close()
    assert sys.path == path
    assert "helpers" not in sys.modules


def test_params_reach_the_factory(load: Load) -> None:
    factory = "def load_environment(level, *, hint='h'):\n    env = Env()\n    env.seen = (level, hint)\n    return env"
    assert load(code=environment_code(factory=factory), level=3, hint="x").environment.seen == (3, "x")


@pytest.mark.parametrize("signature", ["split='none', contract_text=None", "**params"])
def test_platform_params_reach_a_factory_that_takes_them(load: Load, signature: str) -> None:
    names = "locals()" if "=" in signature else "params"
    body = f"    seen = dict({names})\n    env = Env()\n    env.seen = seen\n    return env"
    factory = f"def load_environment({signature}):\n{body}"
    environment = load(code=environment_code(factory=factory), split="hard", contract_text="Be kind.")
    assert environment.environment.seen == {"split": "hard", "contract_text": "Be kind."}


def test_platform_params_are_not_forced_on_a_factory(load: Load) -> None:
    files = {"dataset/hard.jsonl": '{"input": "a"}'}
    environment = load(files, code=environment_code(), split="hard", contract_text="Be kind.")
    assert environment.rows().split == "hard"


@pytest.mark.parametrize(
    ("factory", "params", "error"),
    [
        ("def load_environment(level=1): ...", {"levle": 2}, r"params\.levle: .*it takes: level"),
        ("def load_environment(): ...", {"x": 2}, r"params\.x: .*it takes no parameters"),
        ("def load_environment(level): ...", {}, r"params\.level is missing"),
    ],
)
def test_params_that_do_not_fit_the_factory(load: Load, factory: str, params: dict[str, int], error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        load(code=environment_code(factory=factory), **params)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = 1\n\nraise ValueError('bad\\nluck')", r"environment\.py line 3 in import: ValueError: bad luck"),
        ("def load_environment(:", r"environment\.py line 1 in import: SyntaxError"),
        ("import no_such_package_zz", r"ModuleNotFoundError: No module named 'no_such_package_zz'.*environment\.pip"),
        ("import sys\nsys.exit(3)", r"line 2 in import: called sys\.exit\(3\)"),
        ("import helper", r"helper\.py line 2 in import: ZeroDivisionError"),
        ("import os\nos.environ['NO_SUCH_SECRET']", r"KeyError: 'NO_SUCH_SECRET'"),
        ("x = 1", r"defines no load_environment"),
        ("def load_environment(): 1 / 0", r"line 1 in load_environment\(\): ZeroDivisionError"),
        ("def load_environment(): return 7", r"load_environment\(\) returned int"),
        ("def load_environment(): input()", r"in load_environment\(\): (EOFError|OSError)"),
        ("raise BaseException('deep')", r"line 1 in import: BaseException: deep"),
    ],
)
def test_an_environment_that_fails_to_load_is_one_line(load: Load, code: str, error: str) -> None:
    with pytest.raises(UserCodeError, match=error) as caught:
        load({"helper.py": "\n1 / 0\n"}, code=code)
    assert "\n" not in str(caught.value)
    if caught.value.detail:
        assert "flash/environments" not in caught.value.detail  # the traceback begins in the user's own code


def test_ctrl_c_is_not_the_user_s_code(load: Load) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(code="raise KeyboardInterrupt")


def test_an_endless_traceback_is_cut(load: Load) -> None:
    with pytest.raises(UserCodeError) as caught:
        load(code="raise ValueError('x' * 1_000_000)")
    assert len(str(caught.value)) < 1_000
    assert len(caught.value.detail or "") < 20_000


# --- prompts and targets ----------------------------------------------------------------------------


def opening(text: str) -> str:
    return environment_code(f"def start_episode(self, example, prompt_text):\n    return {text}")


@pytest.mark.parametrize(
    ("messages", "roles"),
    [
        ("[{'role': 'user', 'content': 'u'}]", [("system", "Be kind."), ("user", "u")]),
        (
            "[{'role': 'system', 'content': ' '}, {'role': 'user', 'content': 'u'}]",
            [("system", "Be kind."), ("user", "u")],
        ),
        ("[{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}]", [("system", "s"), ("user", "u")]),
    ],
)
def test_the_prompt_text_leads_unless_a_system_message_speaks(
    load: Load, messages: str, roles: list[tuple[str, str]]
) -> None:
    environment = load(TRAIN, code=opening(messages), contract_text=" Be kind.\n")
    [start] = environment.start("train", [0], seed=0)
    assert [(message["role"], message["content"]) for message in start.messages] == roles


def test_the_training_contract_beside_the_code_is_the_prompt_text(load: Load) -> None:
    files = {"TRAINING_CONTRACT.md": "From the file.", **TRAIN}
    for params, expected in (({}, "From the file."), ({"contract_text": "From params."}, "From params.")):
        [start] = load(files, code=environment_code(), **params).start("train", [0], seed=0)
        assert start.messages[0] == {"role": "system", "content": expected}
    [start] = load(files, code=environment_code(), contract_text="").start("train", [0], seed=0)
    assert start.messages[0]["role"] == "user"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("[]", "start_episode returned an empty list"),
        ("'hello'", "start_episode returned str"),
        ("['hello']", "message 0 is str"),
        ("[{'content': 'x'}]", "message 0: role = None"),
        ("[{'role': 'user', 'content': 7}]", "message 0: content is int"),
        ("[{'role': 'user'}]", "message 0: content is missing"),
        ("[{'role': 'user', 'content': [{'type': 'text'}]}]", "a part without text"),
        ("1 / 0", "ZeroDivisionError"),
        ("exit(1)", r"called sys\.exit"),
    ],
)
def test_an_opening_that_no_template_could_render(load: Load, messages: str, error: str) -> None:
    with pytest.raises(UserCodeError, match=error):
        load(TRAIN, code=opening(messages)).start("train", [0], seed=0)


def test_an_image_in_an_opening_is_refused(load: Load) -> None:
    content = "[{'type': 'image_url', 'image_url': {'url': 'x'}}]"
    with pytest.raises(InvalidInput, match="message 0: has an image"):
        load(TRAIN, code=opening(f"[{{'role': 'user', 'content': {content}}}]")).start("train", [0], seed=0)


def test_text_parts_are_joined_and_other_keys_kept(load: Load) -> None:
    text = "[{'role': 'user', 'name': 'n', 'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]}]"
    assert load(TRAIN, code=opening(text)).start("train", [0], seed=0) == [
        EpisodeStart([{"role": "user", "name": "n", "content": "ab"}], 1)
    ]


CALL = '{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}'  # noqa: E501
RESULT = '{"role": "tool", "tool_call_id": "1", "content": "7"}'


@pytest.mark.parametrize(
    ("output", "roles"),
    [
        ('"b"', ["assistant"]),
        ('{"answer": 1}', ["assistant"]),
        (
            f'{{"messages": [{CALL}, {RESULT}, {{"role": "assistant", "content": "seven"}}]}}',
            ["assistant", "tool", "assistant"],
        ),
        (f"[{CALL}, {RESULT}]", ["assistant", "tool"]),
    ],
)
def test_targets_take_every_form_of_output(load: Load, output: str, roles: list[str]) -> None:
    environment = load({"dataset/train.jsonl": f'{{"input": "a", "output": {output}}}\n'})
    [target] = environment.targets("train", [0])
    assert target.prompt == [{"role": "user", "content": "a"}]
    assert [message["role"] for message in target.completion] == roles
    if "tool" in roles:
        assert target.completion[0]["tool_calls"][0]["function"]["name"] == "f"
        assert target.completion[1]["tool_call_id"] == "1"


def test_an_overridden_sft_completion_is_the_target(load: Load) -> None:
    code = environment_code(
        "def sft_completion(self, example):\n    return [{'role': 'assistant', 'content': example.output * 2}]"
    )
    assert load(TRAIN, code=code).targets("train", [1, 0]) == [
        SFTTarget([{"role": "user", "content": "c"}], [{"role": "assistant", "content": "dd"}]),
        SFTTarget([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "bb"}]),
    ]


# --- steps ------------------------------------------------------------------------------------------


def test_a_step_carries_messages_metadata_and_the_final_text(load: Load) -> None:
    values = "done=False, final_response_text='f', metadata={'s': {1}}"
    body = f"return EnvironmentStepResult(messages=({{'role': 'user', 'content': 'more'}},), {values})"
    environment = load(TRAIN, code=MULTI.replace("BODY", body))
    assert environment.info().multi_turn
    [start] = environment.start("train", [0], seed=0)
    assert start.max_turns == 3
    for messages in ([*start.messages], [*start.messages, {"role": "assistant", "content": "act"}]):
        result = environment.step("train", 0, messages, "act", seed=0)
        assert result.messages == [{"role": "user", "content": "more"}]
        assert (result.done, result.final_response_text, result.metadata) == (False, "f", {"s": [1]})


@pytest.mark.parametrize(
    ("body", "error"), [("return None", "step_episode returned NoneType"), ("1 / 0", "in step_episode: Zero")]
)
def test_a_step_out_of_contract(load: Load, body: str, error: str) -> None:
    with pytest.raises(UserCodeError, match=error):
        load(TRAIN, code=MULTI.replace("BODY", body)).step("train", 0, [], "act", seed=0)


@pytest.mark.parametrize("turns", ["0", "None", "True", "2.5"])
def test_an_episode_needs_at_least_one_turn(load: Load, turns: str) -> None:
    code = environment_code(f"def max_episode_turns(self, example):\n    return {turns}")
    with pytest.raises(UserCodeError, match="max_episode_turns returned"):
        load(TRAIN, code=code).start("train", [0], seed=0)


# --- randomness -------------------------------------------------------------------------------------


def test_hooks_draw_the_same_for_the_same_seed_and_row(load: Load) -> None:
    environment = load(TRAIN, code=opening("[{'role': 'user', 'content': str(random.random())}]"))
    both = [start.messages[0]["content"] for start in environment.start("train", [0, 1], seed=1)]
    random.random()
    assert [start.messages[0]["content"] for start in environment.start("train", [1], seed=1)] == both[1:]
    assert both[0] != both[1]
    assert environment.start("train", [0], seed=2)[0].messages[0]["content"] != both[0]


def test_rows_that_a_factory_draws_are_the_same_after_a_restart(load: Load) -> None:
    factory = (
        "def load_environment():\n    env = Env()\n    env.dataset = [{'input': str(random.random())}]\n    return env"
    )
    first, second = (load(code=environment_code(factory=factory)) for _ in range(2))
    assert Path(first.rows().path).read_text() == Path(second.rows().path).read_text()


def test_threads_do_not_disturb_each_other_s_draws() -> None:
    script = """
        import random, threading
        from flash.environments.loading import make_random_per_thread
        make_random_per_thread()
        from random import choice, shuffle
        random.seed(5); expected = [random.random(), choice(range(99)), random.getrandbits(64), random.gauss(0, 1)]
        random.seed(5); first = random.random()
        other = threading.Thread(target=lambda: [random.seed(1), random.random(), shuffle([1, 2])])
        other.start(); other.join()
        assert [first, choice(range(99)), random.getrandbits(64), random.gauss(0, 1)] == expected
        assert random.Random(5).random() == first
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
