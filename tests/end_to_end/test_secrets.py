"""A canary: an environment that gets a secret and shouts it wherever it can; then it is looked for everywhere."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import psutil
import pytest
from torture.machine import SCRIPTED_SERVER, Machine, wait_for

CANARY = "canary-7f3a9d-of-the-test"

ENVIRONMENT = """
import os, sys
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

secret = os.environ["SERVICE_KEY"]
print("imported with", secret)
print("split over", secret[:9], end="")
sys.stdout.flush()
print(secret[9:], file=sys.stderr)

class Shouting(EnvironmentSingleTurn):
    dataset = [{"input": f"Say {i}.", "output": str(i)} for i in range(4)]

    def build_prompt_messages(self, example, prompt_text):
        print("a prompt with", secret, repr({"key": secret}))
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        print("scoring with", secret)
        if os.environ.get("MODE") == "raise":
            raise RuntimeError(f"the service refused {secret}")
        metrics = (RewardMetric(secret, 1.0), RewardMetric("ok", 1.0))
        return RewardResult(score=len(response) % 3 / 3, reason=secret, metrics=metrics)

def load_environment():
    return Shouting()
"""

TRAIN = {"steps": 4, "save_every": 1, "batch_size": 2, "group_size": 2, "max_tokens": 4, "max_length": 64}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("canary") / "home")
    machine.start()
    machine.push(ENVIRONMENT)
    yield machine
    machine.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["score", "raise"])
def test_a_secret_is_nowhere_but_with_the_environment(machine: Machine, mode: str):
    config = {
        "model": "flash/nano",
        "algorithm": "grpo",
        "environment": {"id": "local/echo", "secrets": ["SERVICE_KEY"]},
        "worker_env": {"MODE": mode},
        "train": TRAIN,
    }
    body = {"config": config, "secrets": {"SERVICE_KEY": CANARY}}
    run_id = machine.call("POST", "/api/runs", json=body)["run_id"]
    shown: set[str] = set()

    def ended() -> bool:
        for process in machine.processes(run_id):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                command, variables = " ".join(process.cmdline()), process.environ()
                shown.add(command)
                if "environment_host" not in command and CANARY in json.dumps(variables):
                    shown.add(f"{CANARY} in the variables of {command}")
        return machine.status(run_id)["state"] in ("done", "failed")

    wait_for(ended, 100, 0.1)
    status = machine.status(run_id)
    assert status["state"] == ("done" if mode == "score" else "failed"), status["summary"]
    assert any("trainer" in line for line in shown)
    assert not [line for line in shown if CANARY in line]
    assert CANARY not in json.dumps(status)
    told = list(machine.events(run_id))
    assert CANARY not in json.dumps(told)
    assert "[redacted]" in json.dumps(told), "the environment did shout"
    machine.kill(15)
    assert _files_with(machine.home, CANARY.encode()) == []
    with sqlite3.connect(machine.home / "flash.db") as database:
        assert database.execute("SELECT count(*) FROM secrets").fetchone() == (0,)
    machine.start()


def test_the_plane_keeps_no_secret_of_a_worker_that_redacts_nothing(tmp_path):
    machine = Machine(tmp_path / "home", command=(*SCRIPTED_SERVER, "leaky_worker.py"))
    try:
        machine.start()
        machine.push()
        config = {"model": "flash/nano", "environment": {"id": "local/echo", "secrets": ["SERVICE_KEY"]}}
        body = {"config": config, "secrets": {"SERVICE_KEY": CANARY}}
        run_id = machine.call("POST", "/api/runs", json=body)["run_id"]
        status = machine.ended(run_id, 100)
        told = list(machine.events(run_id))
    finally:
        machine.kill(15)
        machine.close()
    assert status["state"] == "failed" and status["error"]["message"] == "no [redacted]", status
    assert status["checkpoints"] == [f"{run_id}/step-1"]
    texts = [event["data"]["text"] for event in told if event["kind"] == "log"]
    assert texts[:3] == ["plain [redacted]", "cut here [redacted]", "[redacted] and on"]
    assert texts[-1] == "late [redacted]"
    assert CANARY not in json.dumps([status, told])
    of_the_worker = (machine.home / "work", machine.home / "artifacts")
    found = [Path(path) for path in _files_with(machine.home, CANARY.encode())]
    assert [path for path in found if not any(path.is_relative_to(own) for own in of_the_worker)] == []
    assert (machine.home / "server.out").stat().st_size > 0, "its log was among them"


def _files_with(root: Path, value: bytes) -> list[str]:
    """Files below `root`, the database and the attempts' folders among them, whose bytes hold `value`."""
    return [str(path) for path in root.rglob("*") if path.is_file() and value in path.read_bytes()]
