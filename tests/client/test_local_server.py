"""The local server as several callers meet it: real processes, real locks, real kills."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flash import __version__
from flash.client import local_server
from flash.client.client import FlashClient
from flash.errors import Unavailable
from flash.records import SubmitRequest

ENSURE = (
    "import sys; from pathlib import Path; from flash.client import local_server\n"
    "print(local_server.ensure(Path(sys.argv[1])).pid)"
)
OLD_SERVER = (
    "import sys, flash; flash.__version__ = '0.0.1'; sys.argv[1:] = []\n"
    "from flash.control_plane.main import main; sys.exit(main())"
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty home whose server, if the test starts one, is gone afterwards."""
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    monkeypatch.setenv("FLASH_SERVER_IDLE_EXIT_S", "60")
    yield tmp_path
    pid = local_server.stop(tmp_path)
    assert pid is None or not alive(pid)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def times_started(home: Path) -> int:
    return (home / "logs" / "server.log").read_text().count("listening on")


def test_callers_at_once_start_exactly_one_whatever_a_stale_file_says(home):
    stale = {"port": 9, "token": "kept-token-0123456789", "pid": os.getpid(), "version": __version__}
    (home / "server.json").write_text(json.dumps(stale))  # its pid lives, and is this test's own
    callers = [
        subprocess.Popen([sys.executable, "-c", ENSURE, str(home)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    pids = {caller.communicate(timeout=90)[0].strip() for caller in callers}
    assert len(pids) == 1
    assert times_started(home) == 1
    assert (home / "server.json").stat().st_mode & 0o077 == 0


def test_a_killed_server_is_started_again_at_its_old_address(home):
    first = local_server.ensure(home)
    os.kill(first.pid, signal.SIGKILL)
    second = local_server.ensure(home)
    assert second.pid != first.pid
    assert (second.base_url, second.token) == (first.base_url, first.token)
    with second.client() as client:
        assert client.whoami().org == "local"
    with FlashClient(second.base_url, "wrong", retry_delays_s=()) as client:
        assert client.health()["pid"] == second.pid


def test_nothing_running_is_nothing_to_stop_and_nothing_to_find(home):
    assert local_server.running(home) is None
    assert local_server.stop(home) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"port": "x"}', '{"port": 1, "token": "t", "pid": -5, "version": "1"}']
)
def test_a_torn_file_is_no_server(home, text):
    (home / "server.json").write_text(text)
    assert local_server.running(home) is None


def test_an_idle_server_of_another_version_is_replaced(home):
    old = subprocess.Popen([sys.executable, "-c", OLD_SERVER, local_server.SERVER_MODULE], cwd=home)
    while not (found := local_server.running(home)):
        assert old.poll() is None
    assert found[1].version == "0.0.1"
    said: list[str] = []
    new = local_server.ensure(home, notice=said.append)
    assert new.pid != old.pid
    assert new.version == __version__
    assert said == []
    assert old.wait(10) == 0


def test_a_busy_server_of_another_version_stays_and_is_told_of(home, monkeypatch):
    monkeypatch.setenv("FLASH_SERVER_DEVICES", "")  # so that the run stays queued
    old = subprocess.Popen([sys.executable, "-c", OLD_SERVER, local_server.SERVER_MODULE], cwd=home)
    while not (found := local_server.running(home)):
        assert old.poll() is None
    with found[0].client() as client:
        client.push_environment("local", "task", archive())
        config = {"model": "flash/nano", "environment": {"id": "local/task"}}
        run = client.submit(SubmitRequest(config=config))
        said: list[str] = []
        used = local_server.ensure(home, notice=said.append)
        assert used.pid == old.pid
        assert len(said) == 1
        for part in ("0.0.1", __version__, "1 run(s) under way", "flash server stop"):
            assert part in said[0]
        client.cancel(run.run_id)
        while not client.run(run.run_id).state.terminal:
            time.sleep(0.05)
    assert local_server.ensure(home, notice=said.append).version == __version__
    assert len(said) == 1
    assert old.wait(10) == 0


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("environment.py")
        source = b"def load_environment(): ...\n"
        member.size = len(source)
        tar.addfile(member, io.BytesIO(source))
    return buffer.getvalue()


def test_a_server_that_can_not_start_says_why_in_one_line(home, monkeypatch):
    monkeypatch.setenv("FLASH_SERVER_PORT", "seventy")
    with pytest.raises(Unavailable, match=r"did not start .*seventy.*server\.log"):
        local_server.ensure(home)
    assert local_server.running(home) is None
