"""Workers forked from a preloaded process: as those that are started afresh, only sooner."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flash.launching.launcher import LaunchRequest, Probe
from flash.launching.local import LocalLauncher
from flash.launching.preload import Preloaded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are forks on Linux only")

RUN = f"flash-1-{os.getpid():08x}"  # processes are told apart by it, also those of tests that run beside these
ATTEMPT = f"{RUN}.1"
# The real program, but for what it loads and what its forks do: they tell what they are, and stay.
PROGRAM = """
    import json, os, subprocess, sys, time
    from flash.failpoints import failpoint
    from flash.worker.preloaded import Work, main

    def supervise(trainer):
        hello = json.loads(sys.stdin.readline())
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        trainer.begin({**os.environ, "ROLE": "trainer"}, os.path.dirname(os.getcwd()))
        print(json.dumps({
            "hello": hello, "environ": dict(os.environ), "cwd": os.getcwd(), "rest": sys.stdin.read(),
            "leads": os.getsid(0) == os.getpid(), "trainer": json.loads(trainer.stdout.readline()), "child": child.pid,
        }), flush=True)
        failpoint("supervisor.claimed")
        if hello["device"] == "brief":
            trainer.channel.send(b"go")
            os._exit(trainer.wait())
        time.sleep(60)

    def serve(sock):
        told = {"pid": os.getpid(), "environ": dict(os.environ), "cwd": os.getcwd(), "stdin": sys.stdin.read()}
        print(json.dumps(told), flush=True)
        sock.recv(2)
        os._exit(5)

    main(Work(LOAD, supervise, serve))
"""


def program(load: str = "lambda: None") -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(PROGRAM).replace("LOAD", load))


@pytest.fixture
def preloaded(tmp_path: Path) -> Iterator[Callable[..., Preloaded]]:
    made: list[Preloaded] = []

    def make(load: str = "lambda: None", load_s: float = 60, answer_s: float = 60) -> Preloaded:
        found = Preloaded(tmp_path / "preloaded.log", program=program(load), load_s=load_s, answer_s=answer_s)
        made.append(found)
        found.start()
        return found

    yield make
    for each in made:
        each.close()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., LocalLauncher]]:
    made: list[LocalLauncher] = []
    afresh = (sys.executable, "-c", "print('afresh', flush=True); import time; time.sleep(60)")

    def make(preloaded: Preloaded | None = None, command: tuple[str, ...] = afresh) -> LocalLauncher:
        made.append(LocalLauncher(tmp_path / "work", devices=["cpu"], command=command, preloaded=preloaded))
        return made[-1]

    yield make
    for each in made:
        for handle in each.list().values():
            each.kill(handle)
            wait_for(lambda each=each, handle=handle: each.probe(handle) is Probe.DEAD)


def request(tmp_path: Path, attempt_id: str = ATTEMPT, device: str = "cpu") -> LaunchRequest:
    run_id, _, epoch = attempt_id.rpartition(".")
    work_dir = tmp_path / "work" / run_id / epoch
    return LaunchRequest(attempt_id, "http://127.0.0.1:1", "fslw_secret", str(work_dir), device)


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def said(asked: LaunchRequest) -> str:
    """What the worker has printed, once that is a line."""
    log = Path(asked.work_dir) / "supervisor.log"
    return wait_for(lambda: log.read_text() if "\n" in log.read_text() else "")


def pid_of(handle: str) -> int:
    return int(handle.partition(":")[0])


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_forked_worker_is_what_it_is_told_to_be(launcher, preloaded, tmp_path: Path, monkeypatch):
    own = ("WANDB_API_KEY", "FLASH_SERVER_DATABASE_URL", "FLASH_SERVER_STORE_OPTIONS", "FLASH_SERVER_RAY_TOKEN")
    for name in own:
        monkeypatch.setenv(name, "canary of the server alone")
    monkeypatch.setenv("HF_TOKEN", "canary of the operator")
    forks = preloaded()
    monkeypatch.setenv("SINCE", "the start")
    asked = request(tmp_path, device="cuda:3")
    handle = launcher(forks).launch(asked)
    told = json.loads(said(asked))
    assert told["hello"] == asked.hello("cuda:0") and told["rest"] == ""
    assert told["cwd"] == asked.work_dir and told["leads"]
    assert told["environ"]["CUDA_VISIBLE_DEVICES"] == "3" and told["environ"]["SINCE"] == "the start"
    trainer = told["trainer"]
    assert trainer["environ"] == {**told["environ"], "ROLE": "trainer"}
    assert trainer["cwd"] == str(Path(asked.work_dir).parent) and trainer["stdin"] == ""
    assert told["environ"]["HF_TOKEN"] == "canary of the operator" and not set(own) & set(told["environ"])
    # To everyone else each of them bears the attempt's mark, and the process that they came from has no secret.
    family = [psutil.Process(pid) for pid in (pid_of(handle), trainer["pid"], told["child"])]
    assert [each.environ()["FLASH_ATTEMPT_ID"] for each in family] == [ATTEMPT] * 3
    for each in (*family[:2], psutil.Process(forks.pid)):  # as they were started; a child is started with HF_TOKEN
        assert b"canary" not in Path(f"/proc/{each.pid}/environ").read_bytes()
    assert asked.token not in json.dumps([told["environ"], *(each.cmdline() for each in family)])


def test_forks_differ_and_are_found_again_by_a_restarted_server(launcher, preloaded, tmp_path: Path):
    local = launcher(preloaded())
    first, second = request(tmp_path), request(tmp_path, f"{RUN}.2")
    handles = {asked.attempt_id: local.launch(asked) for asked in (first, second)}
    assert json.loads(said(first))["trainer"]["pid"] != json.loads(said(second))["trainer"]["pid"]
    assert local.launch(first) == handles[ATTEMPT]
    later = launcher()
    assert later.list() == handles
    later.kill(handles[ATTEMPT])
    wait_for(lambda: later.probe(handles[ATTEMPT]) is Probe.DEAD)
    assert later.list() == {second.attempt_id: handles[second.attempt_id]}


def test_the_whole_tree_of_a_fork_is_killed(launcher, preloaded, tmp_path: Path):
    local = launcher(preloaded())
    asked = request(tmp_path)
    handle = local.launch(asked)
    told = json.loads(said(asked))
    local.kill(handle)
    wait_for(lambda: local.probe(handle) is Probe.DEAD)
    assert not any(alive(pid) for pid in (pid_of(handle), told["trainer"]["pid"], told["child"]))
    wait_for(lambda: not psutil.pid_exists(pid_of(handle)))  # reaped too


def test_a_forked_supervisor_takes_its_trainer_along_and_leaves_a_child_that_counts(launcher, preloaded, tmp_path):
    local = launcher(preloaded())
    asked = request(tmp_path)
    handle = local.launch(asked)
    told = json.loads(said(asked))
    os.kill(pid_of(handle), signal.SIGKILL)
    wait_for(lambda: not alive(told["trainer"]["pid"]))
    assert local.probe(handle) is Probe.ALIVE  # its device is not free while what it started lives
    os.kill(told["child"], signal.SIGKILL)
    wait_for(lambda: local.probe(handle) is Probe.DEAD)


def test_a_supervisor_learns_how_its_forked_trainer_ended(launcher, preloaded, tmp_path: Path):
    local = launcher(preloaded())
    asked = request(tmp_path, device="brief")
    handle = local.launch(asked)
    told = json.loads(said(asked))
    wait_for(lambda: not alive(pid_of(handle)))  # it ends as its trainer did
    assert not alive(told["trainer"]["pid"])
    assert local.probe(handle) is Probe.ALIVE and alive(told["child"])


def test_failpoints_count_from_the_fork(launcher, preloaded, tmp_path: Path, monkeypatch):
    forks = preloaded()
    wait_for(lambda: forks.fork(*quiet(tmp_path)))
    monkeypatch.setenv("FLASH_FAILPOINTS", "supervisor.claimed:1")
    local = launcher(forks)
    asked = request(tmp_path)
    handle = local.launch(asked)
    wait_for(lambda: not alive(pid_of(handle)))
    assert alive(json.loads(said(asked))["child"])


def test_forks_outlive_the_process_they_came_from_and_the_next_worker_starts_afresh(launcher, preloaded, tmp_path):
    forks = preloaded()
    local = launcher(forks)
    first, second, third = (request(tmp_path, f"{RUN}.{epoch}") for epoch in (1, 2, 3))
    handle = local.launch(first)
    said(first)
    before = forks.pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: not alive(before))
    assert local.probe(handle) is Probe.ALIVE
    local.launch(second)
    assert said(second) == "afresh\n"
    local.launch(third)  # from the one that took its place
    assert json.loads(said(third))["hello"]["attempt_id"] == third.attempt_id
    assert forks.pid not in (None, before)


def test_one_that_hangs_is_replaced(launcher, preloaded, tmp_path: Path):
    forks = preloaded(answer_s=0.3)
    local = launcher(forks)
    first, second = request(tmp_path), request(tmp_path, f"{RUN}.2")
    local.launch(first)
    said(first)
    before = forks.pid
    os.kill(before, signal.SIGSTOP)
    local.launch(second)
    assert said(second) == "afresh\n"
    assert forks.pid != before and not alive(before)


UNTOLD = """lambda: os.register_at_fork(
    after_in_parent=lambda me=os.getpid(): os.getpid() == me and open("{note}", "w") and os._exit(1))"""
LISTENER = """
    import json, sys, time
    print(json.dumps({"afresh": json.loads(sys.stdin.readline())}), flush=True)
    time.sleep(60)
"""


def test_a_fork_that_nobody_was_told_of_leaves_the_attempt_to_the_worker_in_its_place(launcher, preloaded, tmp_path):
    note = tmp_path / "forked"
    forks = preloaded(UNTOLD.format(note=note))
    local = launcher(forks, (sys.executable, "-c", textwrap.dedent(LISTENER)))
    asked = request(tmp_path)
    handle = local.launch(asked)
    assert note.exists(), "there was a fork"
    assert json.loads(said(asked)) == {"afresh": asked.hello("cpu")}
    wait_for(lambda: supervisors(asked) == {pid_of(handle)})
    assert local.list() == {ATTEMPT: handle}


def supervisors(asked: LaunchRequest) -> set[int]:
    """The processes that write this attempt's log."""
    found, log = set(), Path(asked.work_dir) / "supervisor.log"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(f"/proc/{process.pid}/fd/1").resolve() == log:
                found.add(process.pid)
    return found


def test_descriptors_of_any_number_will_do(launcher, preloaded, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"no more than {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        asked = request(tmp_path)
        launcher(preloaded()).launch(asked)
        assert json.loads(said(asked))["hello"]["attempt_id"] == ATTEMPT
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


THREAD = "lambda: __import__('threading').Thread(target=time.sleep, args=[60]).start()"


@pytest.mark.parametrize("load", ["lambda: sys.exit('no torch')", THREAD])
def test_where_nothing_whole_can_be_forked_workers_start_afresh(launcher, preloaded, tmp_path: Path, load: str):
    forks = preloaded(load)
    local = launcher(forks)
    first, second = request(tmp_path), request(tmp_path, f"{RUN}.2")
    local.launch(first)
    wait_for(lambda: forks.pid is None)
    local.launch(second)
    assert said(first) == said(second) == "afresh\n"
    assert forks.pid is None  # the next one would be no better


def test_one_that_still_loads_is_waited_for(launcher, preloaded, tmp_path: Path):
    local = launcher(preloaded("lambda: time.sleep(1.5)"))
    asked = request(tmp_path)
    local.launch(asked)
    assert json.loads(said(asked))["hello"]["attempt_id"] == ATTEMPT


def test_one_that_never_comes_to_the_end_of_its_loading_is_waited_for_once_and_replaced(
    launcher, preloaded, tmp_path: Path
):
    note = tmp_path / "loading"
    forks = preloaded(f"lambda: os.path.exists('{note}') or (open('{note}', 'w'), time.sleep(600))", load_s=2)
    wait_for(note.exists)
    local, before = launcher(forks), forks.pid
    first, second, third = (request(tmp_path, f"{RUN}.{epoch}") for epoch in (1, 2, 3))
    local.launch(first)
    assert said(first) == "afresh\n"
    assert forks.pid != before and not alive(before)
    os.kill(forks.pid, signal.SIGSTOP)  # its successor is not quick either
    forks._load_s = 600
    local.launch(second)  # nobody waits for it
    assert said(second) == "afresh\n"
    os.kill(forks.pid, signal.SIGCONT)
    wait_for(lambda: forks._wait(0))
    local.launch(third)
    assert json.loads(said(third))["hello"]["attempt_id"] == third.attempt_id


def test_it_ends_with_the_server_and_its_workers_do_not(launcher, preloaded, tmp_path: Path):
    forks = preloaded()
    local = launcher(forks)
    asked = request(tmp_path)
    handle = local.launch(asked)
    said(asked)
    pid = forks.pid
    forks._socket.close()  # as when the server is killed
    wait_for(lambda: not alive(pid))
    assert launcher().probe(handle) is Probe.ALIVE


def test_a_fork_that_is_told_nothing_leaves(preloaded, tmp_path: Path):
    forks = preloaded()
    stdin, log = quiet(tmp_path)
    pid = forks.fork(stdin, log)
    wait_for(lambda: not alive(pid))


def quiet(tmp_path: Path) -> tuple[int, int]:
    return os.open(os.devnull, os.O_RDONLY), os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
