"""Workers as real processes: started once, recognised after a restart, killed with all they started."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flash.launching.launcher import LaunchRequest, Probe
from flash.launching.local import LocalLauncher

RUN = f"flash-1-{os.getpid():08x}"  # processes are told apart by it, also those of tests that run beside these
ATTEMPT = f"{RUN}.1"


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


SERVERS_OWN = (
    "WANDB_API_KEY", "GITHUB_TOKEN", "FREESOLO_API_KEY", "PGPASSWORD", "FLASH_SERVER_DATABASE_URL",
    "FLASH_SERVER_STORE_OPTIONS", "FLASH_SERVER_RAY_TOKEN",
)  # fmt: skip
SLEEPER = program("import time; time.sleep(60)")


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., LocalLauncher]]:
    made: list[LocalLauncher] = []

    def make(command: tuple[str, ...] = SLEEPER) -> LocalLauncher:
        made.append(LocalLauncher(tmp_path / "work", devices=["cpu"], command=command))
        return made[-1]

    yield make
    for each in made:
        for handle in each.list().values():
            each.kill(handle)


def request(tmp_path: Path, attempt_id: str = ATTEMPT, device: str = "cpu") -> LaunchRequest:
    run_id, _, epoch = attempt_id.rpartition(".")
    work_dir = tmp_path / "work" / run_id / epoch
    return LaunchRequest(attempt_id, "http://127.0.0.1:1", "fslw_secret", str(work_dir), device)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_gets_its_token_over_stdin_and_nowhere_else(launcher, tmp_path: Path, monkeypatch):
    for name in SERVERS_OWN:
        monkeypatch.setenv(name, "of the server alone")
    code = """
        import json, os, sys
        hello = json.loads(sys.stdin.read())
        print(json.dumps([hello, sys.argv, dict(os.environ), os.getcwd(), os.getsid(0) == os.getpid()]))
    """
    local = launcher(program(code))
    asked = request(tmp_path, device="cuda:3")
    handle = local.launch(asked)
    wait_for(lambda: local.probe(handle) is Probe.DEAD)
    work_dir = Path(asked.work_dir)
    hello, argv, environment, folder, own_session = json.loads((work_dir / "supervisor.log").read_text())
    assert hello == {
        "attempt_id": ATTEMPT,
        "api_url": asked.api_url,
        "token": asked.token,
        "work_dir": asked.work_dir,
        "device": "cuda:0",  # the only one it sees
    }
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert asked.token not in json.dumps([argv, environment])
    assert "of the server alone" not in environment.values()
    assert folder == str(work_dir) and own_session
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "supervisor.log"]
    assert not [path for path in kept if asked.token in path.read_text()]


@pytest.mark.parametrize("store_keys", [True, False])
def test_a_bucket_reached_by_addresses_needs_no_variables_of_its_provider(tmp_path, monkeypatch, store_keys):
    names = {"AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"}
    for name in names:
        monkeypatch.setenv(name, "the bucket's")
    tell = program("import json, os; print(json.dumps(dict(os.environ)), flush=True)")
    local = LocalLauncher(
        tmp_path / "work", devices=["cpu"], command=tell, engine_command=tell, store_keys=store_keys
    )
    for asked, log in (
        (request(tmp_path), "supervisor.log"),
        (dataclasses.replace(request(tmp_path, f"engine-{RUN}.1"), engine={"device": "cpu"}), "host.log"),
    ):
        handle = local.launch(asked)
        wait_for(lambda handle=handle: local.probe(handle) is Probe.DEAD)
        told = json.loads((Path(asked.work_dir) / log).read_text())
        assert {name for name, value in told.items() if value == "the bucket's"} == (names if store_keys else set())


def test_launching_an_attempt_again_gives_the_same_worker(launcher, tmp_path: Path):
    local = launcher()
    handle = local.launch(request(tmp_path))
    assert local.launch(request(tmp_path)) == handle
    assert launcher().launch(request(tmp_path)) == handle  # a restarted server's launcher too
    assert local.launch(request(tmp_path, f"{RUN}.2")) != handle


def test_a_restarted_server_finds_probes_and_kills_its_workers(launcher, tmp_path: Path):
    handle = launcher().launch(request(tmp_path))
    later = launcher()
    assert later.list() == {ATTEMPT: handle}
    assert later.probe(handle) is Probe.ALIVE
    later.kill(handle)
    wait_for(lambda: later.probe(handle) is Probe.DEAD)
    assert later.list() == {}


def test_a_pid_that_belongs_to_another_program_is_not_the_worker(launcher, tmp_path: Path):
    local = launcher()
    handle = local.launch(request(tmp_path))
    pid = handle.partition(":")[0]
    stranger = f"{pid}:1-00000000"
    assert local.probe(stranger) is Probe.DEAD
    local.kill(stranger)
    assert local.probe(handle) is Probe.ALIVE
    assert local.probe("no handle") is Probe.DEAD


def test_the_whole_tree_is_killed_even_what_left_the_group(launcher, tmp_path: Path):
    code = """
        import subprocess, sys, time
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
        print(*[child.pid for child in children], flush=True)
        time.sleep(60)
    """
    local = launcher(program(code))
    asked = request(tmp_path)
    handle = local.launch(asked)
    log = Path(asked.work_dir) / "supervisor.log"
    wait_for(lambda: len(log.read_text().split()) == 2)
    pids = [int(text) for text in log.read_text().split()]
    local.kill(handle)
    wait_for(lambda: local.probe(handle) is Probe.DEAD)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_a_worker_is_not_dead_while_what_it_started_lives(launcher, tmp_path: Path):
    code = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        print(child.pid, flush=True)
    """
    local = launcher(program(code))
    asked = request(tmp_path)
    handle = local.launch(asked)
    leader = psutil.Process(int(handle.partition(":")[0]))
    wait_for(lambda: not leader.is_running() or leader.status() == psutil.STATUS_ZOMBIE)
    assert local.probe(handle) is Probe.ALIVE  # its device is not free
    later = launcher()
    assert later.list() == {ATTEMPT: handle}
    later.kill(handle)
    wait_for(lambda: later.probe(handle) is Probe.DEAD)


def test_a_stopped_worker_is_alive_and_can_be_killed(launcher, tmp_path: Path):
    local = launcher()
    handle = local.launch(request(tmp_path))
    os.kill(int(handle.partition(":")[0]), signal.SIGSTOP)
    assert local.probe(handle) is Probe.ALIVE
    local.kill(handle)
    wait_for(lambda: local.probe(handle) is Probe.DEAD)


def test_a_worker_that_dies_at_once_is_reaped(launcher, tmp_path: Path):
    local = launcher(program("raise SystemExit(3)"))
    handle = local.launch(request(tmp_path))
    wait_for(lambda: local.probe(handle) is Probe.DEAD)
    assert not psutil.pid_exists(int(handle.partition(":")[0]))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
