"""What `flash status` says in words, for each situation a run can be in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flash.control_plane.server_config import load_settings
from flash.control_plane.settings import ServerSettings
from flash.control_plane.status import backoff_left, summarise
from flash.errors import InvalidInput
from flash.records import AttemptState, Checkpoint, FailureKind, Phase, RunState
from flash.storage.runs import AttemptRow, RunRow

SETTINGS = ServerSettings(home=Path("/nowhere"))
RUN_ID = "flash-1-00000000"


def run(state: RunState, **values: Any) -> RunRow:
    row = {
        "id": RUN_ID, "org_id": "local", "created_at": 0.0, "updated_at": 0.0, "finished_at": None, "config": {},
        "spec": {}, "seed": 0, "environment_namespace": "local", "environment_name": "e", "environment_sha256": "0",
        "init_run_id": None, "init_step": None, "wall_clock_limit_s": None, "desired": "run", "state": state,
        "phase": None, "step": 0, "total_steps": None, "metrics": {}, "eval": None, "warnings": [], "error": None,
        "last_seq": 1, "active_s": 0.0, "retry_at": None, "fruitless": 0, "micro_batch_divisor": 1,
        "retry_of": None, "cleaned_at": None, "estimate": None,
    }  # fmt: skip
    return RunRow(**{**row, **values})


def attempt(epoch: int = 1, **values: Any) -> AttemptRow:
    row = {
        "run_id": RUN_ID, "epoch": epoch, "state": AttemptState.RUNNING, "token_sha256": "", "device": "cuda:1",
        "work_dir": "/w", "handle": "h", "pid": 1, "created_at": 0.0, "claimed_at": 0.0, "heartbeat_at": None,
        "ended_at": None, "phase": None, "step": 0, "progress": 0, "acknowledged": 0, "stop_reason": None,
        "outcome": None, "failure": None, "message": None, "error": None,
    }  # fmt: skip
    return AttemptRow(**{**row, **values})


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        run_id=RUN_ID, step=step, final=False, epoch=1, created_at=0.0, manifest_sha256="0", has_state=True
    )


def words(found: RunRow, *attempts: AttemptRow, steps: tuple[int, ...] = (), now: float = 100.0, ahead: int = 0):
    checkpoints = [checkpoint(step) for step in steps]
    return summarise(found, attempts, checkpoints, now=now, ahead=ahead, settings=SETTINGS)


LOST = attempt(state=AttemptState.ENDED, failure=FailureKind.INFRASTRUCTURE, message="the worker's process died")


@pytest.mark.parametrize(
    ("said", "summary", "following"),
    [
        (words(run(RunState.QUEUED)), "queued", "waiting for a free device"),
        (words(run(RunState.QUEUED), ahead=2), "queued", "behind 2 other run(s)"),
        (
            words(run(RunState.QUEUED, retry_at=107.0), LOST, steps=(40,)),
            "attempt 1 ended: the worker's process died",
            "attempt 2 starts from step 40 in 7 s",
        ),
        (words(run(RunState.QUEUED), LOST), "attempt 1 ended", "attempt 2 starts from the start"),
        (words(run(RunState.PROVISIONING), attempt()), "starting a worker on cuda:1", "prepares the environment"),
        (words(run(RunState.PROVISIONING), LOST, attempt(2)), "(attempt 2)", "prepares"),
        (
            words(run(RunState.RUNNING, phase=Phase.TRAINING, step=30, total_steps=90), attempt(), steps=(20,)),
            "training, step 30 of 90; newest checkpoint at step 20",
            "it trains on",
        ),
        (
            words(run(RunState.RUNNING, desired="cancel", step=3), attempt()),
            "cancel requested at step 3",
            "waiting for the worker to save",
        ),
        (
            words(run(RunState.RUNNING), attempt(stop_reason="wall_clock")),
            "reached its time limit",
            "saves a checkpoint",
        ),
        (
            words(run(RunState.DONE, step=90, eval={"base": 0.25, "adapter": 0.9, "n": 200}), attempt(), steps=(90,)),
            "done after 90 steps; held-out reward 0.900 (base 0.250) on 200 rows",
            "flash export",
        ),
        (
            words(run(RunState.FAILED, step=9, total_steps=90, error={"message": "reward raised"}), steps=(5,)),
            "failed at step 9 of 90: reward raised",
            f"{RUN_ID}/step-5",
        ),
        (words(run(RunState.CANCELLED)), "cancelled", "flash retry"),
        (
            words(run(RunState.DONE, step=9, collected_at=86400.0)),
            "done after 9 steps",
            "removed on 1970-01-02, by the server's keep_files_days",
        ),
        (
            words(run(RunState.FAILED, collected_at=86400.0, ttl_s=5.0)),
            "failed",
            "removed on 1970-01-02, as `flash keep --days` asked",
        ),
    ],
)
def test_each_situation_is_told_in_words(said: tuple[str, str], summary: str, following: str):
    assert summary in said[0] and following in said[1]


@pytest.mark.parametrize("state", [RunState.DONE, RunState.FAILED, RunState.CANCELLED])
def test_nothing_is_promised_of_files_that_are_gone(state: RunState):
    _, following = words(run(state, collected_at=86400.0))
    assert "submit its config again" in following
    assert not any(command in following for command in ("flash deploy", "flash export", "flash retry"))


@pytest.mark.parametrize("phase", list(Phase))
def test_each_phase_says_what_comes_next(phase: Phase):
    summary, following = words(run(RunState.RUNNING, phase=phase), attempt())
    assert phase.value in summary and following


def test_a_back_off_is_never_longer_than_the_longest():
    assert backoff_left(None, 0.0, SETTINGS) == 0
    assert backoff_left(110.0, 100.0, SETTINGS) == 10
    assert backoff_left(90.0, 100.0, SETTINGS) == 0
    assert backoff_left(1e9, 100.0, SETTINGS) == 0


def test_settings_come_from_variables_and_from_the_caller():
    environment = {
        "FLASH_SERVER_LEASE_S": "0.5",
        "FLASH_SERVER_DEVICES": "cuda:0, cuda:1",
        "FLASH_SERVER_STALL_S": "training=5,loading model=7",
        "FLASH_SERVER_HOME": "/elsewhere",
        "OTHER": "x",
    }
    found = load_settings(Path("/home"), environment, port=7)
    assert (found.home, found.lease_s, found.port) == (Path("/home"), 0.5, 7)
    assert found.devices == ("cuda:0", "cuda:1")
    assert (found.stall_limit(Phase.TRAINING), found.stall_limit(Phase.LOADING_MODEL)) == (5.0, 7.0)
    assert found.stall_limit(None) == found.stall_limit(Phase.STARTING)
    assert found.database.database == "/home/flash.db" and found.store == "file:///home/artifacts"
    with pytest.raises(InvalidInput, match="FLASH_SERVER_PORT"):
        load_settings(Path("/home"), {"FLASH_SERVER_PORT": "70000"})
