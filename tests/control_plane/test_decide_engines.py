"""What `decide` says of engines: placed from one queue with runs, watched, idle, in the way of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.control_plane.engines import (
    AdoptEngine,
    BuryEngine,
    DrainEngine,
    EndEngine,
    EngineSnapshot,
    KillEngine,
    LaunchEngine,
    NoteWait,
    StartEngine,
)
from flash.control_plane.reconciler import AttemptSnapshot, RunSnapshot, Snapshot, StartAttempt, decide
from flash.control_plane.settings import ServerSettings
from flash.launching.launcher import Probe
from flash.records import AttemptState, EngineState, Phase, RunState

SETTINGS = ServerSettings(home=Path("/nowhere"))
READY = EngineSnapshot("e", "base", EngineState.READY, device="cuda:0", handle="h", probe=Probe.ALIVE)
WAITING = EngineSnapshot("w", "other", EngineState.WAITING)
TRAINING = AttemptSnapshot(
    epoch=1, state=AttemptState.RUNNING, device="cuda:0", handle="r", probe=Probe.ALIVE, phase=Phase.TRAINING
)
IDLE_S = SETTINGS.engine_yield_s


def run(*attempts: AttemptSnapshot, run_id: str = "r", created_at: float = 0.0) -> RunSnapshot:
    state = RunState.RUNNING if attempts else RunState.QUEUED
    return RunSnapshot(run_id, state, "run", attempts, created_at=created_at)


def decided(
    *engines: EngineSnapshot, runs: tuple[RunSnapshot, ...] = (), devices: tuple[str, ...] = ("cuda:0",)
) -> Any:
    return decide(Snapshot(runs, devices, engines=engines), 0.0, SETTINGS)


def test_attempts_and_engines_that_are_over_are_leaving():
    over = replace(TRAINING, state=AttemptState.ENDING)
    hosts = (READY, replace(READY, engine_id="e2", state=EngineState.ENDING))
    assert Snapshot((run(over), run(TRAINING, run_id="r2")), ("cuda:0",), engines=hosts).leaving == {"r.1", "e2"}


# --- devices ------------------------------------------------------------------------------------------


def test_a_waiting_engine_gets_a_free_device():
    assert decided(WAITING) == [StartEngine("w", "cuda:0")]
    assert decided(READY, WAITING, devices=("cuda:0", "cuda:1")) == [StartEngine("w", "cuda:1")]


def test_a_gpu_holds_a_run_or_an_engine_and_the_processor_one_of_each():
    assert decided(WAITING, runs=(run(TRAINING),)) == [NoteWait("w", "waiting for a free device: cuda:0 trains a run")]
    on_cpu = replace(TRAINING, device="cpu")
    assert decided(WAITING, runs=(run(on_cpu),), devices=("cpu",)) == [StartEngine("w", "cpu")]
    assert decided(replace(READY, device="cpu"), runs=(run(),), devices=("cpu",)) == [StartAttempt("r", 1, "cpu")]
    both = decided(WAITING, runs=(run(),), devices=("cpu",))
    assert set(both) == {StartEngine("w", "cpu"), StartAttempt("r", 1, "cpu")}
    apart = SETTINGS.model_copy(update={"share_cpu": False})
    alone = decide(Snapshot((run(on_cpu),), ("cpu",), engines=(WAITING,)), 0.0, apart)
    assert alone == [NoteWait("w", "waiting for a free device: cpu trains a run")]
    [note] = decided(replace(READY, device="cpu"), WAITING, devices=("cpu",))
    assert note == NoteWait("w", "waiting for a free device: cpu serves base")


@pytest.mark.parametrize("first", ["run", "engine"])
def test_runs_and_engines_wait_in_one_queue(first: str):
    waiting = replace(WAITING, created_at=2.0 if first == "run" else 0.0)
    actions = decided(waiting, runs=(run(created_at=1.0),))
    placed = StartAttempt("r", 1, "cuda:0") if first == "run" else StartEngine("w", "cuda:0")
    assert placed in actions and len([a for a in actions if isinstance(a, StartAttempt | StartEngine)]) == 1


def test_a_reason_is_noted_once_and_an_engine_that_no_one_waits_for_is_dropped():
    told = replace(WAITING, reason="waiting for a free device: cuda:0 trains a run")
    assert decided(told, runs=(run(TRAINING),)) == []
    forgotten = replace(WAITING, unwanted_s=SETTINGS.engine_want_s)
    assert decided(forgotten) == [BuryEngine("w")]
    assert decided(WAITING, devices=()) == [NoteWait("w", "waiting: the server has no device")]


# --- making room --------------------------------------------------------------------------------------


def test_an_idle_engine_yields_to_a_queued_run_and_a_busy_one_does_not():
    assert decided(READY, runs=(run(),)) == []
    assert decided(replace(READY, unused_s=IDLE_S), runs=(run(),)) == [DrainEngine("e", "it yields cuda:0 to a run")]
    assert decided(replace(READY, unused_s=IDLE_S)) == []
    shared = replace(READY, device="cpu", unused_s=IDLE_S)
    busy_run = run(replace(TRAINING, device="cpu"), run_id="t")
    assert decided(shared, runs=(busy_run, run()), devices=("cpu",)) == []  # it would not help


def test_an_idle_engine_yields_to_another_bases():
    idle = replace(READY, device="cpu", unused_s=IDLE_S)
    assert DrainEngine("e", "it yields cpu to another engine") in decided(idle, WAITING, devices=("cpu",))


def test_only_as_many_leave_as_are_needed_the_longest_idle_first():
    idle = [replace(READY, engine_id=f"e{n}", device=f"cuda:{n}", unused_s=IDLE_S + n) for n in range(3)]
    devices = ("cuda:0", "cuda:1", "cuda:2")
    one = decided(*idle, runs=(run(),), devices=devices)
    assert one == [DrainEngine("e2", "it yields cuda:2 to a run")]
    leaving = replace(idle[2], state=EngineState.DRAINING)
    assert decided(*idle[:2], leaving, runs=(run(),), devices=devices) == []
    two = decided(*idle[:2], leaving, runs=(run(), run(run_id="r2")), devices=devices)
    assert two == [DrainEngine("e1", "it yields cuda:1 to a run")]


def test_an_engine_without_requests_leaves_by_and_by():
    assert decided(replace(READY, unused_s=SETTINGS.engine_idle_s - 1)) == []
    [drain] = decided(replace(READY, unused_s=SETTINGS.engine_idle_s))
    assert isinstance(drain, DrainEngine)
    never = SETTINGS.model_copy(update={"engine_idle_s": 0.0})
    assert decide(Snapshot((), ("cuda:0",), engines=(replace(READY, unused_s=1e9),)), 0.0, never) == []


# --- watching -----------------------------------------------------------------------------------------


def test_an_engine_without_a_handle_is_adopted_launched_or_given_up():
    lost = replace(READY, handle=None, probe=None)
    assert decided(replace(lost, found="h2")) == [AdoptEngine("e", "h2")]
    assert decided(replace(lost, state=EngineState.LAUNCHING)) == [LaunchEngine("e")]
    assert decided(lost) == []  # its heartbeat tells
    for state in (EngineState.DRAINING, EngineState.ENDING):
        assert decided(replace(lost, state=state)) == [BuryEngine("e")]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (EngineState.LAUNCHING, "the engine's process ended before it was ready"),
        (EngineState.LOADING, "the engine's process ended before it was ready"),
        (EngineState.READY, "the engine's process died"),
        (EngineState.DRAINING, None),
        (EngineState.ENDING, None),
    ],
)
def test_a_dead_host_is_buried_with_the_right_words(state: EngineState, words: str | None):
    assert decided(replace(READY, state=state, probe=Probe.DEAD)) == [BuryEngine("e", words)]


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (replace(READY, state=EngineState.LAUNCHING, state_s=SETTINGS.claim_timeout_s), "did not report"),
        (replace(READY, silent_s=SETTINGS.lease_s), "no sign"),
        (replace(READY, state=EngineState.LOADING, silent_s=SETTINGS.lease_s), "no sign"),
        (replace(READY, state=EngineState.LOADING, state_s=SETTINGS.engine_load_s), "not loaded"),
        (replace(READY, state=EngineState.DRAINING, state_s=SETTINGS.engine_drain_s), "did not leave"),
    ],
)
def test_an_overdue_engine_is_fenced_off_and_killed(engine: EngineSnapshot, words: str):
    [end] = decided(engine)
    assert isinstance(end, EndEngine) and words in end.message
    assert decided(replace(engine, state=EngineState.ENDING)) == [KillEngine("h", "its engine is over")]
    assert decided(replace(engine, silent_s=0.0, state_s=0.0)) == []


# --- always -------------------------------------------------------------------------------------------

engines = st.builds(
    EngineSnapshot,
    engine_id=st.uuids().map(str),
    model=st.sampled_from(["base", "other"]),
    state=st.sampled_from([state for state in EngineState if state is not EngineState.ENDED]),
    created_at=st.floats(0, 9),
    handle=st.sampled_from([None, "h"]),
    probe=st.sampled_from([*Probe, None]),
    found=st.sampled_from([None, "f"]),
    silent_s=st.sampled_from([0.0, 1e6]),
    state_s=st.sampled_from([0.0, 1e6]),
    unused_s=st.sampled_from([0.0, 20.0, 1e6]),
    unwanted_s=st.sampled_from([0.0, 1e6]),
)
DEVICES = ("cpu", "cuda:0", "cuda:1")


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Whatever may be so: one engine and one run a device, none beside another on a GPU."""
    found, runs = [], []
    for number, device in enumerate(DEVICES):
        holds = draw(st.sampled_from(["", "engine", "run", "both"]))
        if holds in ("engine", "both"):
            engine = draw(engines.filter(lambda each: each.state is not EngineState.WAITING))
            found.append(replace(engine, device=device))
        if holds == "run" or (holds == "both" and device == "cpu"):
            runs.append(run(replace(TRAINING, device=device), run_id=f"t{number}"))
    waiting = draw(st.lists(engines.map(lambda each: replace(each, state=EngineState.WAITING)), max_size=3))
    queued = [run(run_id=f"q{n}", created_at=at) for n, at in enumerate(draw(st.lists(st.floats(0, 9), max_size=3)))]
    return Snapshot((*runs, *queued), DEVICES, engines=(*found, *waiting))


@settings(max_examples=200)
@given(snapshots())
def test_a_device_is_never_promised_twice_and_no_busy_engine_leaves_for_another(snapshot: Snapshot):
    actions = decide(snapshot, 0.0, SETTINGS)
    engines_on = [engine.device for engine in snapshot.engines if engine.device]
    engines_on += [action.device for action in actions if isinstance(action, StartEngine)]
    runs_on = [attempt.device for each in snapshot.runs for attempt in each.attempts]
    runs_on += [action.device for action in actions if isinstance(action, StartAttempt)]
    assert len(set(engines_on)) == len(engines_on) and len(set(runs_on)) == len(runs_on)
    assert not set(engines_on) & set(runs_on) - {"cpu"}
    by_id = {engine.engine_id: engine for engine in snapshot.engines}
    for action in actions:
        if isinstance(action, DrainEngine):
            drained = by_id[action.engine_id]
            assert drained.state is EngineState.READY and drained.unused_s >= SETTINGS.engine_yield_s
        if isinstance(action, StartEngine):
            assert by_id[action.engine_id].state is EngineState.WAITING
    assert decide(snapshot, 0.0, SETTINGS) == actions
