"""`decide`, which is pure: what it says for single situations, and what it never says for any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.control_plane.reconciler import (
    Adopt,
    AskToStop,
    AttemptSnapshot,
    ConfirmDead,
    EndAttempt,
    Kill,
    Launch,
    Orphan,
    Requeue,
    RunSnapshot,
    Settle,
    Snapshot,
    StartAttempt,
    decide,
)
from flash.control_plane.settings import STALL_S, ServerSettings
from flash.launching.launcher import Probe
from flash.records import AttemptState, FailureKind, Phase, RunState

SETTINGS = ServerSettings(home=Path("/nowhere"))
NOW = 1_000_000.0
LIVE = AttemptSnapshot(
    epoch=1, state=AttemptState.RUNNING, device="cpu", handle="h", probe=Probe.ALIVE, phase=Phase.TRAINING
)
ENDED = replace(LIVE, state=AttemptState.ENDED, probe=None)


def run(*attempts: AttemptSnapshot, state: RunState = RunState.RUNNING, **values: Any) -> RunSnapshot:
    return RunSnapshot(**{"run_id": "r", "state": state, "desired": "run", "attempts": attempts, **values})


def decided(*runs: RunSnapshot, devices: tuple[str, ...] = ("cpu",), orphans: tuple[Orphan, ...] = ()) -> list[Any]:
    return decide(Snapshot(runs, devices, orphans), NOW, SETTINGS)


def failed(failure: FailureKind | None, **values: Any) -> AttemptSnapshot:
    return replace(ENDED, failure=failure, outcome="failed", **values)


# --- placing ----------------------------------------------------------------------------------------


def test_devices_go_to_the_oldest_queued_runs_one_each():
    queued = [run(state=RunState.QUEUED, run_id=f"r{number}") for number in range(4)]
    assert decided(run(replace(LIVE, device="b")), *queued, devices=("a", "b", "c")) == [
        StartAttempt("r0", 1, "a"),
        StartAttempt("r1", 1, "c"),
    ]


def test_a_run_in_back_off_waits_and_holds_no_one_up():
    waiting = run(ENDED, state=RunState.QUEUED, run_id="r0", retry_at=NOW + 5)
    assert decided(waiting, run(state=RunState.QUEUED, run_id="r1")) == [StartAttempt("r1", 1, "cpu")]
    assert decided(replace(waiting, retry_at=NOW)) == [StartAttempt("r0", 2, "cpu")]


def test_a_wall_clock_that_jumped_back_does_not_stretch_a_back_off():
    assert decided(run(ENDED, state=RunState.QUEUED, retry_at=NOW + 86400)) == [StartAttempt("r", 2, "cpu")]


@pytest.mark.parametrize("probe", [Probe.ALIVE, Probe.UNKNOWN])
def test_a_device_is_not_free_before_its_worker_is_known_dead(probe: Probe):
    dying = run(replace(LIVE, state=AttemptState.ENDING, probe=probe), state=RunState.CANCELLED, run_id="old")
    assert not [a for a in decided(dying, run(state=RunState.QUEUED)) if isinstance(a, StartAttempt)]
    dead = run(replace(ENDED), state=RunState.CANCELLED, run_id="old")
    assert StartAttempt("r", 1, "cpu") in decided(dead, run(state=RunState.QUEUED))


# --- watching ---------------------------------------------------------------------------------------


def test_a_healthy_attempt_is_left_alone():
    assert decided(run(LIVE)) == []


def test_a_lost_lease_ends_the_attempt():
    (action,) = decided(run(replace(LIVE, silent_s=SETTINGS.lease_s)))
    assert isinstance(action, EndAttempt) and action.failure is FailureKind.INFRASTRUCTURE


@pytest.mark.parametrize("phase", list(Phase))
def test_each_phase_has_its_own_stall_deadline(phase: Phase):
    limit = STALL_S[phase.value]
    assert decided(run(replace(LIVE, phase=phase, stuck_s=limit - 1))) == []
    (action,) = decided(run(replace(LIVE, phase=phase, stuck_s=limit)))
    assert isinstance(action, EndAttempt) and action.failure is FailureKind.STALL and phase.value in action.message


def test_a_worker_that_never_claims_is_given_up():
    launching = replace(LIVE, state=AttemptState.LAUNCHING, state_s=SETTINGS.claim_timeout_s)
    (action,) = decided(run(launching, state=RunState.PROVISIONING))
    assert isinstance(action, EndAttempt) and "did not report" in action.message


def test_a_dead_process_is_confirmed_at_once():
    (action,) = decided(run(replace(LIVE, probe=Probe.DEAD)))
    assert action == ConfirmDead("r", 1, FailureKind.INFRASTRUCTURE, "the worker's process died")


def test_an_unreachable_cluster_kills_nothing_while_the_worker_beats():
    assert decided(run(replace(LIVE, probe=Probe.UNKNOWN))) == []


def test_a_worker_without_a_handle_is_adopted_launched_or_given_up():
    lost = replace(LIVE, handle=None, probe=None)
    assert decided(run(replace(lost, found="h2"))) == [Adopt("r", 1, "h2")]
    launching = replace(lost, state=AttemptState.LAUNCHING)
    assert decided(run(launching, state=RunState.PROVISIONING)) == [Launch("r", 1, "cpu")]
    assert decided(run(launching, state=RunState.PROVISIONING, desired="cancel")) == [ConfirmDead("r", 1)]
    assert decided(run(lost)) == []  # claimed before its handle was kept: its heartbeat tells
    (end,) = decided(run(replace(lost, silent_s=99)))
    assert isinstance(end, EndAttempt)
    assert decided(run(replace(lost, state=AttemptState.ENDING))) == [ConfirmDead("r", 1)]


def test_a_finished_worker_may_leave_by_itself_and_a_fenced_one_may_not():
    finished = replace(LIVE, state=AttemptState.ENDING, outcome="failed", failure=FailureKind.USER_CODE)
    assert decided(run(finished)) == []
    assert decided(run(replace(finished, state_s=SETTINGS.exit_grace_s))) != []
    fenced = replace(LIVE, state=AttemptState.ENDING, failure=FailureKind.STALL, message="stuck")
    assert decided(run(fenced)) == [Kill("h", "stuck")]
    assert decided(run(replace(fenced, probe=Probe.DEAD)))[0] == ConfirmDead("r", 1)


def test_orphans_are_killed_after_a_grace():
    young = Orphan("x.1", "h1", SETTINGS.orphan_grace_s - 1)
    old = Orphan("y.1", "h2", SETTINGS.orphan_grace_s)
    assert decided(orphans=(young, old)) == [Kill("h2", "no one owns y.1")]


# --- cancel and limits ------------------------------------------------------------------------------


def test_a_cancel_asks_first_kills_later_and_settles_when_death_is_known():
    wanted = {"desired": "cancel"}
    assert decided(run(LIVE, **wanted)) == [AskToStop("r", 1, "cancel")]
    asked = replace(LIVE, stop_reason="cancel")
    assert decided(run(asked, **wanted)) == []
    (end,) = decided(run(replace(asked, stop_s=SETTINGS.cancel_grace_s), **wanted))
    assert isinstance(end, EndAttempt) and end.failure is None
    ending = replace(asked, state=AttemptState.ENDING)
    assert not [a for a in decided(run(ending, **wanted)) if isinstance(a, Settle)]
    assert decided(run(ENDED, **wanted)) == [Settle("r", RunState.CANCELLED, "cancelled")]
    assert decided(run(state=RunState.QUEUED, **wanted)) == [Settle("r", RunState.CANCELLED, "cancelled")]


def test_what_was_done_before_the_cancel_arrived_is_done():
    done = replace(LIVE, state=AttemptState.ENDING, outcome="done")
    (settle,) = decided(run(done, desired="cancel"))
    assert settle.state is RunState.DONE


def test_the_wall_clock_limit_asks_for_a_flush_then_ends_for_good():
    over = {"active_s": 3600.0, "wall_clock_limit_s": 3600.0}
    assert decided(run(LIVE, active_s=3599.0, wall_clock_limit_s=3600.0)) == []
    assert decided(run(LIVE, **over)) == [AskToStop("r", 1, "wall_clock")]
    late = replace(LIVE, stop_reason="wall_clock", stop_s=SETTINGS.flush_grace_s)
    (end,) = decided(run(late, **over))
    assert end.failure is FailureKind.WALL_CLOCK
    (settle,) = decided(run(failed(FailureKind.WALL_CLOCK), **over))
    assert settle.state is RunState.FAILED
    waiting = replace(LIVE, state=AttemptState.LAUNCHING)
    (end,) = decided(run(waiting, state=RunState.PROVISIONING, **over))
    assert end.failure is FailureKind.WALL_CLOCK


# --- retries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [FailureKind.INFRASTRUCTURE, FailureKind.STALL, FailureKind.PREEMPTED])
def test_losses_are_retried_until_three_in_a_row_bring_no_checkpoint(failure: FailureKind):
    first, second = (decided(run(failed(failure), fruitless=number))[0] for number in (0, 1))
    assert (first.fruitless, second.fruitless) == (1, 2)
    assert first.delay_s < second.delay_s
    (last,) = decided(run(failed(failure), fruitless=2))
    assert isinstance(last, Settle) and last.state is RunState.FAILED and "3 attempts in a row" in last.reason
    (saved,) = decided(run(failed(failure, brought_checkpoint=True), fruitless=2))
    assert isinstance(saved, Requeue) and saved.fruitless == 0


def test_out_of_memory_is_tried_once_more_with_a_smaller_micro_batch():
    (again,) = decided(run(failed(FailureKind.OUT_OF_MEMORY)))
    assert isinstance(again, Requeue) and again.micro_batch_divisor == 2
    (end,) = decided(run(failed(FailureKind.OUT_OF_MEMORY), micro_batch_divisor=2))
    assert isinstance(end, Settle) and end.state is RunState.FAILED


@pytest.mark.parametrize("failure", [FailureKind.USER_CODE, FailureKind.INVALID_INPUT, FailureKind.INTERNAL])
def test_what_would_fail_again_is_not_retried_and_keeps_its_account(failure: FailureKind):
    told = {"code": "user_code", "message": "division by zero", "remedy": None, "detail": "Traceback"}
    (end,) = decided(run(failed(failure, error=told, message="division by zero")))
    assert end.state is RunState.FAILED and end.reason == "division by zero"
    assert end.error == told


def test_back_off_grows_to_its_cap():
    patient = SETTINGS.model_copy(update={"fruitless_limit": 100})
    runs = [run(failed(FailureKind.STALL), fruitless=number) for number in range(60)]
    delays = [decide(Snapshot((each,), ("cpu",)), NOW, patient)[0].delay_s for each in runs]
    assert delays == sorted(delays) and delays[0] == patient.backoff_first_s and delays[-1] == patient.backoff_max_s


# --- always -----------------------------------------------------------------------------------------

attempts = st.builds(
    AttemptSnapshot,
    epoch=st.integers(1, 3),
    state=st.sampled_from(AttemptState),
    device=st.sampled_from(["a", "b"]),
    handle=st.sampled_from([None, "h"]),
    probe=st.sampled_from([*Probe, None]),
    found=st.sampled_from([None, "f"]),
    phase=st.sampled_from([*Phase, None]),
    silent_s=st.sampled_from([0.0, 1e6]),
    stuck_s=st.sampled_from([0.0, 1e6]),
    state_s=st.sampled_from([0.0, 1e6]),
    stop_reason=st.sampled_from([None, "cancel", "wall_clock"]),
    stop_s=st.sampled_from([0.0, 1e6]),
    outcome=st.sampled_from([None, "done", "failed", "cancelled"]),
    failure=st.sampled_from([*FailureKind, None]),
    brought_checkpoint=st.booleans(),
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    runs = []
    for number in range(draw(st.integers(0, 4))):
        history = draw(st.lists(attempts, max_size=3))
        history = [
            replace(each, epoch=epoch, state=each.state if epoch == len(history) else AttemptState.ENDED)
            for epoch, each in enumerate(history, 1)
        ]
        runs.append(
            RunSnapshot(
                run_id=f"r{number}",
                state=draw(st.sampled_from(RunState)),
                desired=draw(st.sampled_from(["run", "cancel"])),
                attempts=tuple(history),
                retry_at=draw(st.sampled_from([None, NOW - 1, NOW + 1, NOW + 1e9])),
                fruitless=draw(st.integers(0, 3)),
                micro_batch_divisor=draw(st.sampled_from([1, 2])),
                active_s=draw(st.sampled_from([0.0, 1e9])),
                wall_clock_limit_s=draw(st.sampled_from([None, 3600.0])),
            )
        )
    return Snapshot(tuple(runs), draw(st.sampled_from([(), ("a",), ("a", "b")])))


@settings(max_examples=150)
@given(snapshots())
def test_never_two_attempts_on_one_device_and_never_a_second_life(snapshot: Snapshot):
    actions = decide(snapshot, NOW, SETTINGS)
    runs = {each.run_id: each for each in snapshot.runs}
    taken = {a.device for each in snapshot.runs for a in each.attempts if a.live}
    starts = [action for action in actions if isinstance(action, StartAttempt)]
    assert len({start.device for start in starts} | taken) == len(starts) + len(taken)
    assert {start.device for start in starts} <= set(snapshot.devices)
    for start in starts:
        each = runs[start.run_id]
        assert each.state is RunState.QUEUED and each.desired == "run"
        assert not any(attempt.live for attempt in each.attempts)
        assert start.epoch == len(each.attempts) + 1
    for action in actions:
        if isinstance(action, Settle | Requeue):
            assert not runs[action.run_id].state.terminal
        if isinstance(action, Requeue):
            assert runs[action.run_id].desired == "run"
            assert 0 <= action.delay_s <= SETTINGS.backoff_max_s
        if isinstance(action, Settle) and action.state is RunState.CANCELLED:
            assert not any(attempt.live for attempt in runs[action.run_id].attempts)
    judged = [action.run_id for action in actions if isinstance(action, Settle | Requeue | StartAttempt)]
    assert len(judged) == len(set(judged))


@settings(max_examples=50)
@given(snapshots())
def test_deciding_is_a_function_of_what_it_sees(snapshot: Snapshot):
    assert decide(snapshot, NOW, SETTINGS) == decide(snapshot, NOW, SETTINGS)
