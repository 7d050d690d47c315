"""User code in its own process: limits, deaths, isolation, and what it prints."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flash.environments.protocol import FinishedEpisode, Score
from flash.errors import InternalError, InvalidInput, UserCodeError
from flash.worker.channel import Call, Channel
from flash.worker.environment_host import (
    MODULE,
    CallLimits,
    EnvironmentHost,
    HostBounds,
    HostSpec,
    RemoteEnvironment,
)

CODE = """
    import os, pathlib, random, signal, subprocess, sys, threading, time
    from freesolo.environments import EnvironmentMultiTurn, EnvironmentSingleTurn, EnvironmentStepResult, RewardResult

    class Env(EnvironmentSingleTurn):
        max_score_concurrency = CONCURRENCY

        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, text):
            BODY
            return RewardResult(score=float(text == example.output))

    def load_environment(**params):
        return Env()
"""


class Hosted:
    """A host on a package of its own, and what it has printed."""

    def __init__(self, folder: Path, work_dir: Path, limits: CallLimits, **spec: Any) -> None:
        self.folder, self.work_dir = folder, work_dir
        self.printed: list[tuple[str, str]] = []
        spec = {"params": {}, "variables": {}, **spec}
        self.host = EnvironmentHost(
            HostSpec(folder, work_dir, **spec), on_output=lambda *line: self.printed.append(line), limits=limits
        )

    def score(self, *texts: str, limit: float = 20.0) -> list[float | None]:
        episodes = [{"messages": [], "response_text": text} for text in texts]
        params = {"split": "train", "index": 0, "episodes": episodes, "seed": 0}
        return [score["reward"] for score in self.host.call("score", params, limit)]

    def wait_printed(self, stream: str, text: str) -> str:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = [line for name, line in list(self.printed) if name == stream and text in line]
            if found:
                return found[0]
            time.sleep(0.005)
        raise AssertionError(f"{text!r} was not printed to {stream}: {self.printed}")


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Callable[..., Hosted]]:
    """hosted(body, code=..., concurrency=..., files=..., limits=..., **HostSpec) starts nothing yet."""
    made: list[Hosted] = []

    def make(
        body: str = "pass",
        *,
        code: str = CODE,
        concurrency: int = 8,
        files: dict[str, str] | None = None,
        limits: CallLimits | None = None,
        **spec: Any,
    ) -> Hosted:
        folder = tmp_path / f"package-{len(made)}"
        indented = textwrap.dedent(body).strip().replace("\n", "\n" + " " * 12)
        source = textwrap.dedent(code.replace("BODY", indented).replace("CONCURRENCY", str(concurrency)))
        rows = '{"input": "a", "output": "yes"}\n{"input": "b", "output": "yes"}\n'
        for name, text in {"environment.py": source, "dataset/train.jsonl": rows, **(files or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        made.append(Hosted(folder, tmp_path / f"work-{len(made)}", limits or CallLimits(), **spec))
        return made[-1]

    yield make
    for one in made:
        one.host.close()


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


# --- the whole protocol -----------------------------------------------------------------------------


def test_a_trainer_meets_the_environment_through_supervisor_and_host(hosted: Callable[..., Hosted]) -> None:
    one = hosted(params={"contract_text": "Be kind."})
    trainer_end, supervisor_end = socket.socketpair()
    passing = Channel(supervisor_end, on_call=one.host.call).start()
    trainer = Channel(trainer_end).start()
    environment = RemoteEnvironment(trainer)
    assert environment.info().splits == ("train",)
    assert not environment.info().multi_turn
    rows = environment.rows(limit=1)
    assert (rows.split, rows.count) == ("train", 1)
    assert Path(rows.path).is_relative_to(one.work_dir)
    assert [target.completion[0]["content"] for target in environment.targets("train", [0])] == ["yes"]
    [start] = environment.start("train", [0], seed=1)
    assert [message["content"] for message in start.messages] == ["Be kind.", "a"]
    assert start.max_turns == 1
    assert environment.step("train", 0, [*start.messages], "act", seed=1).done
    episodes = [FinishedEpisode(start.messages, "yes"), FinishedEpisode(start.messages, "no")]
    assert environment.score("train", 0, episodes, seed=1) == [Score(1.0, success=True), Score(0.0, success=False)]
    with pytest.raises(InvalidInput, match="split 'eval' is missing"):
        environment.rows("eval")
    with pytest.raises(InvalidInput, match="it has 1 rows"):
        environment.start("train", [1], seed=1)
    environment.close()
    passing.close()
    trainer.close()


def test_a_reward_that_raises_comes_back_with_its_traceback(hosted: Callable[..., Hosted]) -> None:
    one = hosted("if text == 'bad': raise ValueError('no')")
    with pytest.raises(UserCodeError, match=r"environment\.py line \d+ in scoring: ValueError: no") as caught:
        one.score("bad")
    assert "raise ValueError" in str(caught.value.detail)
    assert one.score("yes") == [1.0]
    assert one.host.restarts == 0


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("raise RuntimeError('at import')", UserCodeError, "RuntimeError: at import"),
        ("import sys; sys.exit(0)", UserCodeError, r"called sys\.exit"),
        ("import os; os._exit(3)", UserCodeError, "died in load: it exited with status 3"),
        ("x = 1", UserCodeError, "defines no load_environment"),
        ("import time; time.sleep(60)", UserCodeError, "load took longer than 0.7 s"),
    ],
)
def test_an_environment_that_does_not_load(
    hosted: Callable[..., Hosted], code: str, error: type[Exception], message: str
) -> None:
    one = hosted(code=code, limits=CallLimits(load_s=0.7))
    with pytest.raises(error, match=message):
        one.host.start()
    assert one.host.pid is None


def test_a_python_that_is_not_there_is_one_error(hosted: Callable[..., Hosted]) -> None:
    with pytest.raises(InternalError, match="can't be started"):
        hosted(python="/nowhere/python").host.start()


# --- limits and deaths ------------------------------------------------------------------------------

HANGS = {
    "sleep": "time.sleep(60)",
    "busy loop": "while True: pass",
    "ignores signals": "signal_off(); time.sleep(60)",
    "deadlock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "in C, holding the interpreter": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
}


@pytest.mark.parametrize("kind", HANGS)
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_call_that_hangs_is_ended_at_its_limit(hosted: Callable[..., Hosted], kind: str, concurrency: int) -> None:
    body = HANGS[kind].replace("signal_off()", "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))")
    one = hosted(f"if text == 'hang':\n    {body}", concurrency=concurrency)
    assert one.score("yes") == [1.0]
    pid = one.host.pid
    assert pid is not None
    began = time.monotonic()
    with pytest.raises(UserCodeError, match=r"score took longer than 0\.3 s"):
        one.score("hang", limit=0.3)
    assert time.monotonic() - began < 3
    assert gone(pid)
    assert one.score("yes") == [1.0]
    assert one.host.restarts == 1


DEATHS = {
    "os._exit(0)": "it exited with status 0",
    "os._exit(9)": "it exited with status 9",
    "os.abort()": "killed by SIGABRT",
    "__import__('ctypes').string_at(0)": "killed by SIGSEGV",
    "os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)": "killed by SIGKILL, most likely for want of memory",
    "os.closerange(3, 4096)": "closed the connection",
    "os.closerange(3, 4096); open('/dev/null'); open('/dev/null'); open('/dev/null')": "closed the connection",
}


@pytest.mark.parametrize("body", DEATHS)
def test_a_process_that_dies_is_named_and_replaced(hosted: Callable[..., Hosted], body: str) -> None:
    one = hosted(f"if text == 'die': {body}")
    with pytest.raises(UserCodeError, match=f"died in score: .*{DEATHS[body]}"):
        one.score("die")
    assert one.score("yes") == [1.0]


def test_a_host_that_something_killed_is_asked_again(hosted: Callable[..., Hosted], tmp_path: Path) -> None:
    one = hosted(f"""
        if text == 'once' and not pathlib.Path({str(tmp_path)!r}, 'been').exists():
            pathlib.Path({str(tmp_path)!r}, 'been').touch()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(9)
    """)
    one.score("once")
    assert one.host.restarts == 1


HUNGRY = "kept.append(bytearray(os.urandom(1 << 20) * 16))"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"kept = []\nwhile text == 'eat': {HUNGRY}", "MiB of memory, more than its 400 MiB"),
        (f"kept = []\nif text == 'eat' and not os.fork():\n    while 1: {HUNGRY}\nwhile text == 'eat': time.sleep(1)",
         "MiB of memory, more than its 400 MiB"),
        ("while text == 'eat': subprocess.Popen(['sleep', '30'])", "processes, more than its 30"),
    ],
)  # fmt: skip
def test_a_host_that_takes_too_much_is_stopped_and_replaced(
    hosted: Callable[..., Hosted], body: str, message: str
) -> None:
    one = hosted(body, bounds=HostBounds(memory_bytes=400 << 20, processes=30, interval_s=0.02))
    with pytest.raises(UserCodeError, match=f"stopped in score: .*{message}"):
        one.score("eat")
    assert one.score("yes") == [1.0]


def test_the_kernel_takes_the_host_before_the_trainer(hosted: Callable[..., Hosted]) -> None:
    one = hosted()
    one.host.start()
    if Path("/proc/self/oom_score_adj").exists():
        assert int(Path(f"/proc/{one.host.pid}/oom_score_adj").read_text()) >= 900


def test_what_a_crash_says_last_is_in_the_output(hosted: Callable[..., Hosted]) -> None:
    one = hosted("if text == 'die': __import__('ctypes').string_at(0)")
    with pytest.raises(UserCodeError):
        one.score("die")
    one.wait_printed("stderr", "Segmentation fault")
    one.wait_printed("stderr", "environment.py")


def test_innocent_calls_outlive_a_neighbour_s_time_out(hosted: Callable[..., Hosted]) -> None:
    one = hosted("if text == 'hang': time.sleep(60)\nif text == 'slow': time.sleep(1.0); text = 'yes'")
    one.host.start()
    results: dict[str, Any] = {}

    def score(name: str, text: str, limit: float) -> None:
        try:
            results[name] = one.score(text, limit=limit)
        except UserCodeError as error:
            results[name] = error

    threads = [
        threading.Thread(target=score, args=args) for args in (("guilty", "hang", 0.4), ("innocent", "slow", 20.0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results["guilty"], UserCodeError)
    assert results["innocent"] == [1.0]


def test_calls_that_wait_their_turn_do_not_pay_for_others(hosted: Callable[..., Hosted]) -> None:
    one = hosted("time.sleep(0.25)", concurrency=1)
    one.host.start()
    results: list[list[float | None]] = []
    threads = [threading.Thread(target=lambda: results.append(one.score("yes", limit=0.6))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0]] * 5
    assert one.host.restarts == 0


def test_rows_are_read_again_after_a_restart(hosted: Callable[..., Hosted]) -> None:
    one = hosted("if text == 'die': os._exit(1)", files={"dataset/train.jsonl": '{"input": "a", "output": "yes"}\nbad'})
    one.host.call("rows", {"split": None, "limit": 1})
    with pytest.raises(UserCodeError):
        one.score("die")
    assert one.score("yes") == [1.0]


def test_close_ends_a_load_under_way_and_later_calls_fail(hosted: Callable[..., Hosted]) -> None:
    one = hosted(code="import time; print('loading'); time.sleep(60)")
    failures: list[Exception] = []

    def start() -> None:
        try:
            one.host.start()
        except UserCodeError as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    one.wait_printed("stdout", "loading")
    one.host.close()
    thread.join(5)
    assert [str(failure) for failure in failures] == ["the environment host is closed"]
    with pytest.raises(UserCodeError, match="is closed"):
        one.host.call("info", {})


# --- concurrency ------------------------------------------------------------------------------------


def test_groups_are_scored_at_once(hosted: Callable[..., Hosted]) -> None:
    one = hosted("barrier.wait(10)", code=CODE.replace("class Env", "barrier = threading.Barrier(4)\n\n    class Env"))
    one.host.start()
    results: list[list[float | None]] = []
    threads = [threading.Thread(target=lambda: results.append(one.score("yes"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0]] * 4


def test_a_serial_environment_stays_on_the_thread_that_imported_it(hosted: Callable[..., Hosted]) -> None:
    code = CODE.replace("class Env", "home = threading.get_ident()\n\n    class Env")
    one = hosted("assert threading.get_ident() == home", code=code, concurrency=1)
    one.host.start()
    threads = [threading.Thread(target=one.score, args=("yes", "no")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.score("yes") == [1.0]


# --- isolation --------------------------------------------------------------------------------------


def test_the_host_sees_declared_variables_and_nothing_of_the_parent_s(
    hosted: Callable[..., Hosted], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "FLASH_HOME",
        "FLASH_API_URL",
        "FREESOLO_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
    ):
        monkeypatch.setenv(name, "canary-value")
    monkeypatch.setenv("PYTHONPATH", "/canary-value")
    code = "import os\nprint(sorted(os.environ.items()))\nprint(os.path.expanduser('~'), os.getcwd())\nraise ValueError"
    one = hosted(code=code, variables={"SERVICE_API_KEY": "secret", "FEATURE_FLAG": "on"})
    with pytest.raises(UserCodeError):
        one.host.start()
    seen = one.wait_printed("stdout", "SERVICE_API_KEY")
    assert "('FEATURE_FLAG', 'on')" in seen
    assert "canary-value" not in seen
    assert "FLASH_" not in seen
    assert one.wait_printed("stdout", str(one.folder)) == f"{one.work_dir / 'home'} {one.folder}"


def test_no_descriptor_of_the_parent_s_is_open_in_the_host(hosted: Callable[..., Hosted], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with canary.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        links = "[os.readlink(p) for p in (f'/proc/self/fd/{n}' for n in range(256)) if os.path.lexists(p)]"
        code = f"import os\nprint('open', {links})\nraise ValueError"
        one = hosted(code=code)
        with pytest.raises(UserCodeError):
            one.host.start()
    seen = one.wait_printed("stdout", "open")
    assert "canary" not in seen
    assert seen.count("socket:") == 1


def test_a_sibling_named_like_a_standard_module_does_not_break_the_host(hosted: Callable[..., Hosted]) -> None:
    one = hosted(files={"socket.py": "1 / 0", "queue.py": "1 / 0", "typing.py": "1 / 0", "flash.py": "1 / 0"})
    assert one.score("yes") == [1.0]


def test_code_may_change_directory_spawn_threads_and_close_its_output(hosted: Callable[..., Hosted]) -> None:
    body = "os.chdir('/'); threading.Thread(target=time.sleep, args=(60,)).start(); sys.stdout.close(); os.close(1)"
    one = hosted(f"if text == 'odd': {body}")
    assert one.score("odd") == [0.0]
    assert one.score("yes") == [1.0]
    pid = one.host.pid
    assert pid is not None
    one.host.close()
    assert gone(pid)


FORKS = {
    "a subprocess": "pid = subprocess.Popen(['sleep', '60']).pid",
    "a subprocess in its own session": "pid = subprocess.Popen(['sleep', '60'], start_new_session=True).pid",
    "a fork": "pid = os.fork() or time.sleep(60)",
    "a daemon": """
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    grandchild = os.fork()
    if grandchild:
        os.write(w, str(grandchild).encode())
    time.sleep(60)
pid = int(os.read(r, 20))
""".strip(),
}


@pytest.mark.parametrize("kind", FORKS)
@pytest.mark.parametrize("end", ["close", "limit", "death"])
def test_children_of_user_code_go_with_it(hosted: Callable[..., Hosted], kind: str, end: str) -> None:
    body = f"if text != 'yes':\n    {FORKS[kind].replace(chr(10), chr(10) + '    ')}\n    print('child', pid)\n"
    one = hosted(body + "if text == 'hang': time.sleep(60)\nif text == 'die': os._exit(1)")
    if end == "close":
        one.score("fork")
    else:
        with pytest.raises(UserCodeError):
            one.score("hang" if end == "limit" else "die", limit=0.5 if end == "limit" else 20)
    pid = int(one.wait_printed("stdout", "child").split()[1])
    if end == "close":
        assert psutil.pid_exists(pid)
        one.host.close()
    assert gone(pid)


def test_a_fork_that_returns_from_a_reward_does_not_answer(hosted: Callable[..., Hosted]) -> None:
    for concurrency in (1, 8):
        one = hosted("if text == 'fork': os.fork()", concurrency=concurrency)
        assert one.score("fork") == [0.0]
        assert one.score("yes") == [1.0]
        assert one.host.restarts == 0


def test_the_host_goes_when_its_supervisor_is_killed(hosted: Callable[..., Hosted], tmp_path: Path) -> None:
    one = hosted("if text == 'fork':\n    print('child', subprocess.Popen(['sleep', '60']).pid)")
    one.score("fork")
    pid = one.host.pid
    child = int(one.wait_printed("stdout", "child").split()[1])
    assert pid is not None
    one.host._process._channel.close()  # type: ignore[union-attr]  # all that the host sees of a killed parent
    assert gone(pid)
    assert gone(child)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_code_stuck_in_c_ends_although_nobody_ends_it(hosted: Callable[..., Hosted], concurrency: int) -> None:
    """The test stands for a supervisor that is too dead to keep the limit, not dead enough to close the connection."""
    package = hosted("if text == 'stuck': __import__('re').match('(a+)+$', 'a' * 99 + 'b')", concurrency=concurrency)
    package.work_dir.mkdir(exist_ok=True)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", MODULE, "--fd", str(theirs.fileno()), "--grace", "0.3"]
    with subprocess.Popen(command, cwd=package.folder, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as process:
        theirs.close()
        channel = Channel(ours).start()
        try:
            folders = {"folder": str(package.folder), "work_dir": str(package.work_dir)}
            channel.call("load", {**folders, "params": {}, "contract": None}, timeout_s=600)
            channel.call("rows", {"split": None, "limit": 0}, timeout_s=600)

            def score(text: str) -> Call:
                episodes = [{"messages": [], "response_text": text}]
                params = {"split": "train", "index": 0, "episodes": episodes, "seed": 0}
                return channel.begin("score", params, timeout_s=0.3)

            for _ in range(3):
                assert score("yes").result.result(20)[0]["reward"] == 1.0
                time.sleep(0.6)  # in all longer than a call's limit and the grace: nothing runs, so nothing ends
            score("stuck")
            assert process.wait(20) == 1
        finally:
            process.kill()
            channel.close()


# --- output -----------------------------------------------------------------------------------------


def test_prints_arrive_by_line_and_stream(hosted: Callable[..., Hosted]) -> None:
    one = hosted("print('out\\nzwei ü'); print('err', file=sys.stderr); os.write(1, b'\\xff\\n')")
    one.score("yes")
    one.wait_printed("stdout", "\ufffd")
    one.wait_printed("stderr", "err")
    assert [line for stream, line in one.printed if stream == "stdout"] == ["out", "zwei ü", "\ufffd"]


def test_endless_output_is_cut_and_does_not_block(hosted: Callable[..., Hosted]) -> None:
    one = hosted("print('x' * 5_000_000)\nfor _ in range(20_000): print('y' * 99)\ntime.sleep(0.1)")
    assert one.score("yes") == [1.0]
    one.host.close()
    one.wait_printed("stdout", "bytes of output left out")
    assert sum(len(line) for _, line in one.printed) < 1_500_000


def test_a_listener_that_fails_does_not_block_user_code(tmp_path: Path, hosted: Callable[..., Hosted]) -> None:
    one = hosted("for _ in range(5_000): print('y' * 99)")
    one.printed = None  # type: ignore[assignment]  # every append fails from here on
    assert one.score("yes") == [1.0]
