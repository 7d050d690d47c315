"""`flash retry` trains on exactly: the adapter is that of a run which nobody stopped."""

from __future__ import annotations

import pytest
from torture.machine import Machine, wait_for
from torture.resuming import GRPO, SFT

# Long enough that a cancel at an early step meets them under way, on the fastest machine too.
LONG_SFT = {**SFT, "epochs": 1000, "max_steps": 250, "save_every": 5}
LONG_GRPO = {**GRPO, "steps": 120, "save_every": 5}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("retry") / "home")
    machine.start()
    machine.push()
    yield machine
    machine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "train"), [("sft", LONG_SFT), ("grpo", LONG_GRPO)])
@pytest.mark.timeout(300)
def test_a_cancelled_run_retried_gives_the_adapter_of_one_that_was_left_alone(machine: Machine, algorithm: str, train):
    whole = machine.submit(train, algorithm=algorithm)
    stopped = machine.submit(train, algorithm=algorithm)
    wait_for(lambda: machine.status(stopped)["step"] >= 2, 200)
    machine.call("POST", f"/api/runs/{stopped}/cancel")
    ended = machine.ended(stopped)
    assert ended["state"] == "cancelled"
    assert 0 < len(ended["checkpoints"]) < ended["total_steps"]
    retried = machine.call("POST", f"/api/runs/{stopped}/retry", json={})
    assert retried["step"] > 0
    assert machine.ended(retried["run_id"])["state"] == "done"
    assert machine.adapter_sha256(retried["run_id"]) == machine.adapter_sha256(whole)
