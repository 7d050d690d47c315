"""The server as a process: one of it, where it says it is, what it survives, when it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flash.control_plane.main import main

COMMAND = (sys.executable, "-P", "-m", "flash.control_plane.main")
QUICK = {"FLASH_SERVER_RECONCILE_INTERVAL_S": "0.05", "FLASH_SERVER_IDLE_EXIT_S": "0"}


class Process:
    """A server process of one home, with a client that has its key."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        self.child = subprocess.Popen(
            COMMAND,
            env={**os.environ, "FLASH_HOME": str(home), **QUICK, **settings},
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """`server.json`, once it is this process's own."""
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            assert self.child.poll() is None, self.child.stderr and self.child.stderr.read()
            try:
                found = json.loads((self.home / "server.json").read_text())
            except (OSError, ValueError):
                found = {}
            if found.get("pid") == self.child.pid:
                return dict(found)
            time.sleep(0.02)
        raise AssertionError("it never listened")

    def client(self) -> httpx.Client:
        found = self.ready()
        return httpx.Client(
            base_url=f"http://127.0.0.1:{found['port']}",
            headers={"Authorization": f"Bearer {found['token']}"},
            trust_env=False,
            timeout=20,
        )

    def signal(self, number: int) -> int:
        self.child.send_signal(number)
        return self.child.wait(timeout=20)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(**settings: str) -> Process:
        started.append(Process(tmp_path / "home", **settings))
        return started[-1]

    yield start
    for each in started:
        if each.child.poll() is None:
            each.child.kill()
        each.child.wait()
        assert each.child.stderr is not None
        each.child.stderr.close()


def test_it_says_where_it_is_stays_alone_and_keeps_its_address(serve, tmp_path: Path):
    first = serve()
    said = first.ready()
    assert set(said) == {"host", "port", "token", "pid", "version", "started_at", "config"}
    assert (tmp_path / "home" / "server.json").stat().st_mode & 0o777 == 0o600
    with first.client() as http:
        assert http.get("/api/health").json()["pid"] == first.child.pid
        who = http.get("/api/whoami").json()
        assert who.pop("key").startswith("key-")
        assert who == {
            "org": "local",
            "role": "owner",
            "name": "this machine",
            "server": f"http://127.0.0.1:{said['port']}",
        }
    refused = serve()
    assert refused.child.wait(timeout=30) == 1
    assert refused.child.stderr is not None
    lines = refused.child.stderr.read().splitlines()
    assert len(lines) == 1 and "in use by another Flash server" in lines[0]
    assert first.signal(signal.SIGTERM) == 0
    second = serve()
    again = second.ready()
    assert (again["port"], again["token"]) == (said["port"], said["token"])
    assert second.signal(signal.SIGTERM) == 0
    with socket.create_server(("127.0.0.1", said["port"])):  # another program takes the port: it is left to it
        other = serve().ready()
        assert other["port"] != said["port"] and other["token"] == said["token"]


def test_only_who_starts_environments_has_to_be_able_to_start_them_as_another_user(serve):
    user = {"FLASH_SERVER_HOST_USER": "no-such-user"}
    refused = serve(**user)
    assert refused.child.wait(timeout=60) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a cluster that is away
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    on_a_cluster = serve(**user, FLASH_SERVER_LAUNCHER="ray", FLASH_SERVER_RAY_ADDRESS=address)
    assert on_a_cluster.ready()["pid"] == on_a_cluster.child.pid


def test_kill_9_loses_no_acknowledged_submit_and_repeats_make_no_second_run(serve, pack):
    body = {"config": {"model": "flash/nano", "environment": {"id": "local/arith"}}}
    server = serve(FLASH_SERVER_DEVICES="")
    acknowledged: dict[str, str] = {}
    with server.client() as http:
        archive = pack({"environment.py": "x = 1\n"})
        assert http.post("/api/environments/local/arith", content=archive).status_code == 201

        def submit() -> None:
            for number in range(1000):
                key = f"key-{number}"
                try:
                    answer = http.post("/api/runs", json=body, headers={"Idempotency-Key": key})
                except httpx.TransportError:
                    return
                acknowledged[key] = answer.json()["run_id"]

        submitter = threading.Thread(target=submit)
        submitter.start()
        while len(acknowledged) < 5:
            time.sleep(0.01)
        server.signal(signal.SIGKILL)
        submitter.join()
    with serve(FLASH_SERVER_DEVICES="").client() as http:
        listed = {run["run_id"] for run in http.get("/api/runs", params={"limit": 1000}).json()["runs"]}
        assert set(acknowledged.values()) <= listed and len(listed) <= len(acknowledged) + 1
        for key, run_id in list(acknowledged.items())[:3]:
            again = http.post("/api/runs", json=body, headers={"Idempotency-Key": key})
            assert (again.status_code, again.json()["run_id"]) == (200, run_id)
        for run_id in list(acknowledged.values())[:3]:
            events = http.get(f"/api/runs/{run_id}/events").json()["events"]
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


def submit_one(http: httpx.Client, pack) -> str:
    assert http.post("/api/environments/local/arith", content=pack({"environment.py": ""})).status_code == 201
    config = {"model": "flash/nano", "environment": {"id": "local/arith"}}
    return str(http.post("/api/runs", json={"config": config}).json()["run_id"])


@pytest.mark.parametrize("how", ["signal", "request"])
def test_it_ends_in_time_with_streams_open(serve, pack, how: str):
    server = serve(FLASH_SERVER_DEVICES="")
    with server.client() as http, server.client() as second:
        run_id = submit_one(http, pack)
        with http.stream("GET", f"/api/runs/{run_id}/events/stream") as stream:
            assert "queued" in next(line for line in stream.iter_lines() if line.startswith("data:"))
            began = time.monotonic()
            if how == "signal":
                server.child.send_signal(signal.SIGTERM)
            else:
                assert second.post("/api/server/stop").status_code == 202
            assert server.child.wait(timeout=20) == 0
            assert time.monotonic() - began < 6


def test_it_leaves_when_idle_but_never_while_a_run_lives(serve, pack):
    server = serve(FLASH_SERVER_IDLE_EXIT_S="0.4", FLASH_SERVER_DEVICES="")
    with server.client() as http:
        run_id = submit_one(http, pack)
        time.sleep(1.2)
        assert server.child.poll() is None
        http.post(f"/api/runs/{run_id}/cancel")
    assert server.child.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"FLASH_SERVER_LEASE_S": "soon"}, "lease_s"),
        ({"FLASH_SERVER_HOST": "0.0.0.0"}, "127.0.0.1"),
        ({"FLASH_SERVER_STALL_S": "training=5,dreaming=4"}, "dreaming"),
    ],
)
def test_settings_that_are_wrong_are_said_in_one_line(
    tmp_path: Path, monkeypatch, capsys, settings: dict[str, str], words: str
):
    for name, value in {"FLASH_HOME": str(tmp_path), **settings}.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_arguments_that_it_does_not_know_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--port", "1"])
    assert left.value.code == 2
    assert "--port" in capsys.readouterr().err


def test_it_imports_neither_torch_nor_training():
    code = """
import sys
import flash.control_plane.listening, flash.control_plane.main
heavy = {"torch", "transformers", "flash.training", "flash.inference", "alembic", "ray"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
