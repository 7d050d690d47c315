"""Scoring: which hook is asked, what a reward sees, and that nothing malformed becomes a number."""

from collections.abc import Callable

import pytest
from freesolo.environments import RewardMetric, RewardResult

from flash.environments.loading import LocalEnvironment
from flash.environments.protocol import FinishedEpisode, Score
from flash.environments.rewards import Response, to_scores
from flash.errors import UserCodeError

Load = Callable[..., LocalEnvironment]

TRAIN = {"dataset/train.jsonl": '{"input": "a", "output": "b"}\n'}
CODE = """
    import threading
    import time
    import random
    from freesolo.environments import EnvironmentMultiTurn, EnvironmentSingleTurn, RewardMetric, RewardResult

    class Base:
        def start_episode(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def build_prompt_messages(self, example, prompt_text):
            return self.start_episode(example, prompt_text)

        def max_episode_turns(self, example):
            return 2

        def step_episode(self, example, messages, assistant_response):
            raise NotImplementedError

        def score_response(self, example, response_text):
            return RewardResult(score=1.0, reason="score_response")

    class Env(Base, KIND):
        METHODS

    def load_environment():
        return Env()
"""


def code(methods: str, kind: str = "EnvironmentSingleTurn") -> str:
    indented = "\n        ".join(methods.splitlines())
    return CODE.replace("METHODS", indented or "pass").replace("KIND", kind)


def episode(text: str, **values: object) -> FinishedEpisode:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    return FinishedEpisode(**{"messages": messages, "response_text": text, **values})  # type: ignore[arg-type]


def rewards(environment: LocalEnvironment, *texts: str) -> list[float | None]:
    return [score.reward for score in environment.score("train", 0, [episode(text) for text in texts], seed=0)]


# --- hooks ------------------------------------------------------------------------------------------

ONE = "def score_{0}(self, example, {0}):\n    return RewardResult(score={1})"
MANY = "def score_{0}(self, example, {0}):\n    return [RewardResult(score={1}) for _ in {0}]"


@pytest.mark.parametrize(
    ("methods", "kind", "reward"),
    [
        ("", "EnvironmentSingleTurn", 1.0),
        (MANY.format("responses", 3.0), "EnvironmentSingleTurn", 3.0),
        (ONE.format("episode", 4.0), "EnvironmentSingleTurn", 4.0),
        (MANY.format("episodes", 5.0), "EnvironmentSingleTurn", 5.0),
        (MANY.format("responses", 3.0) + "\n" + ONE.format("episode", 4.0), "EnvironmentSingleTurn", 3.0),
        (MANY.format("responses", 3.0) + "\n" + MANY.format("episodes", 5.0), "EnvironmentSingleTurn", 5.0),
        (ONE.format("episode", 4.0), "EnvironmentMultiTurn", 4.0),
        (ONE.format("episode", 4.0) + "\n" + MANY.format("responses", 3.0), "EnvironmentMultiTurn", 4.0),
        (ONE.format("episode", 4.0) + "\n" + MANY.format("episodes", 5.0), "EnvironmentMultiTurn", 5.0),
    ],
)
def test_the_hook_that_an_environment_overrides_is_the_one_asked(
    load: Load, methods: str, kind: str, reward: float
) -> None:
    assert rewards(load(TRAIN, code=code(methods, kind)), "x", "y") == [reward, reward]


def test_results_keep_the_order_of_the_group(load: Load) -> None:
    body = "time.sleep(0.03 / len(text))\n    return RewardResult(score=len(text))"
    methods = f"def score_response(self, example, text):\n    {body}"
    assert rewards(load(TRAIN, code=code(methods)), "a", "bb", "ccc") == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("cap", "threads"), [(1, 1), (8, 4)])
def test_a_cap_of_one_keeps_scoring_on_the_calling_thread(load: Load, cap: int, threads: int) -> None:
    methods = (
        f"max_score_concurrency = {cap}\nbarrier = threading.Barrier({threads})\n"
        "def score_response(self, example, text):\n"
        "    self.barrier.wait(5)\n"
        "    return RewardResult(score=float(threading.get_ident() == threading.main_thread().ident))"
    )
    environment = load(TRAIN, code=code(methods))
    assert environment.serial == (cap == 1)
    assert rewards(environment, *"abcd"[:threads]) == [float(cap == 1)] * threads


# --- what a reward sees -----------------------------------------------------------------------------


def test_a_response_is_the_answer_with_its_thinking(load: Load) -> None:
    methods = (
        "def score_response(self, example, text):\n"
        "    ok = text == '7' and isinstance(text, str) and (text.completion, text.thinking, text.raw)"
        " == ('7', 'hm', '<think>hm</think>7')\n"
        "    return RewardResult(score=float(ok))"
    )
    seen = episode("7", thinking="hm", raw="<think>hm</think>7")
    assert load(TRAIN, code=code(methods)).score("train", 0, [seen], seed=0)[0].reward == 1.0
    assert Response("a").raw == "a"


def test_an_episode_has_transcript_turns_metadata_and_tokens(load: Load) -> None:
    methods = (
        "def score_episode(self, example, episode):\n"
        "    assert episode.messages[-1] == {'role': 'assistant', 'content': 'x'} and example.output == 'b'\n"
        "    assert [(t.role, t.content) for t in episode.turns] == [('user', 'a'), ('assistant', 'x')]\n"
        "    assert episode.metadata['steps'] == [{'k': 1}] and episode.total_tokens == 9\n"
        "    return RewardResult(score=1.0)"
    )
    seen = episode("x", metadata={"steps": [{"k": 1}]}, total_tokens=9)
    [score] = load(TRAIN, code=code(methods, "EnvironmentMultiTurn")).score("train", 0, [seen], seed=0)
    assert score.reward == 1.0


# --- what is a reward -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("RewardResult(score=float('nan'))", "score = nan: must be finite"),
        ("RewardResult(score=float('-inf'))", "must be finite"),
        ("RewardResult(score=1e12)", "must lie within"),
        ("RewardResult(score=10 ** 400)", "must lie within"),
        ("RewardResult(score='1')", "must be a number"),
        ("RewardResult(score=None)", "must be a number"),
        ("RewardResult(score=[1])", "must be a number"),
        ("RewardResult(score=1.0, error='judge timed out')", "judge timed out"),
        ("1.0", "returned float"),
        ("None", "returned NoneType"),
    ],
)
def test_what_is_no_reward_is_an_error_and_never_zero(load: Load, expression: str, error: str) -> None:
    body = f"return {expression} if text == 'bad' else RewardResult(score=0.5)"
    methods = f"def score_response(self, example, text):\n    {body}"
    good, bad = load(TRAIN, code=code(methods)).score("train", 0, [episode("good"), episode("bad")], seed=0)
    assert good.reward == 0.5
    assert bad.reward is None
    assert error in str(bad.error)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return [RewardResult(score=1.0)]", "returned 1 results for 2 responses"),
        ("return []", "returned 0 results"),
        ("return 1.0", "returned float: it must return a list"),
        ("raise ValueError('no judge')", r"environment\.py line \d+ in scoring: ValueError: no judge"),
        ("raise SystemExit(2)", r"called sys\.exit"),
    ],
)
def test_a_group_that_can_not_be_scored_raises_for_the_whole(load: Load, body: str, error: str) -> None:
    methods = f"def score_responses(self, example, texts):\n    {body}"
    with pytest.raises(UserCodeError, match=error):
        rewards(load(TRAIN, code=code(methods)), "x", "y")


def test_an_exception_in_one_response_has_its_traceback(load: Load) -> None:
    methods = "def score_response(self, example, text):\n    return RewardResult(score=1 / len(text))"
    with pytest.raises(UserCodeError, match="ZeroDivisionError") as caught:
        rewards(load(TRAIN, code=code(methods)), "x", "")
    assert "1 / len(text)" in str(caught.value.detail)


def test_numbers_of_every_kind_count() -> None:
    import numpy

    values = [True, 1, 0.25, numpy.float32(0.5), numpy.int64(2)]
    scores = to_scores([RewardResult(score=value) for value in values], expected=5)
    assert [score.reward for score in scores] == [1.0, 1.0, 0.25, 0.5, 2.0]


def test_metrics_and_success_come_along() -> None:
    metrics = (
        RewardMetric("score", score=0.5, value=9),
        RewardMetric("value", value=3),
        RewardMetric("success", success=True),
        RewardMetric("text", value="words"),
        RewardMetric("nan", score=float("nan")),
    )
    [score] = to_scores([RewardResult(score=1.0, metrics=metrics)], expected=1)
    assert score == Score(1.0, success=True, metrics={"score": 0.5, "value": 3.0, "success": 1.0})
    [below] = to_scores([RewardResult(score=1.0, threshold=2.0)], expected=1)
    assert below.success is False
