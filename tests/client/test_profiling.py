"""A run's events as spans, for courses that a quick real run does not take."""

from __future__ import annotations

import pytest

from flash.client.profiling import chrome_trace, profile
from flash.records import AttemptView, Event, EventKind, ManagedView, RunState, RunStatus

BEGAN = 1_000.0


def history(*told: tuple[float, str, int | None, dict]) -> list[Event]:
    return [
        Event(run_id="flash-1", seq=seq, time=BEGAN + time, kind=EventKind(kind), epoch=epoch, data=data)
        for seq, (time, kind, epoch, data) in enumerate(told, 1)
    ]


def run(*attempts: AttemptView, state: RunState = RunState.DONE) -> RunStatus:
    return RunStatus(
        run_id="flash-1", state=state, phase=None, step=0, total_steps=None, summary="", next="", spec={}, seed=0,
        created_at=BEGAN, updated_at=BEGAN, finished_at=None, attempts=attempts, metrics={}, checkpoints=(),
        adapter_ref=None, deployment=None, estimated_cost_usd=None, cost_usd=None, error=None, managed=ManagedView(),
    )  # fmt: skip


def step(number: int, **values: float) -> dict:
    return {"step": number, "values": values}


TWO_ATTEMPTS = history(
    (0, "state", None, {"to": "queued"}),
    (2, "state", None, {"to": "provisioning"}),
    (2, "attempt", 1, {"epoch": 1, "state": "launching"}),
    (3, "attempt", 1, {"epoch": 1, "state": "running"}),
    (4, "phase", 1, {"phase": "loading model"}),
    (5, "phase", 1, {"phase": "loading model", "done_bytes": 1, "total_bytes": 2}),
    (6, "phase", 1, {"phase": "training"}),
    (8, "metrics", 1, step(1, seconds=1.5, seconds_sampling=1.0, seconds_scoring=0.2, seconds_update=0.3, reward=0.5)),
    (8.1, "metrics", 1, step(2, seconds=1.0, seconds_sampling=0.5, seconds_scoring=0.0, seconds_update=0.5)),
    (8.5, "metrics", 1, step(2, seconds_checkpoint=0.2)),
    (9.5, "checkpoint", 1, {"step": 2, "final": False}),
    (10, "attempt", 1, {"epoch": 1, "state": "ending"}),
    (11, "attempt", 2, {"epoch": 2, "state": "launching"}),
    (12, "attempt", 2, {"epoch": 2, "state": "running"}),
    (12.5, "warning", 2, {"code": "x", "text": "careful"}),
    (13, "phase", 2, {"phase": "training"}),
    (14, "metrics", 2, step(3, seconds=0.5, seconds_optimizer=0.1, loss=2.0)),
)


def test_each_attempt_has_its_own_tracks_and_phases_follow_each_other():
    found = profile(run(AttemptView(epoch=1, state="ended", device="cpu", ended_at=BEGAN + 10.5)), TWO_ATTEMPTS)
    first, second = found.attempts
    assert [(span.name, span.start - BEGAN, span.end - BEGAN) for span in first.phases] == [
        ("launching", 2, 3), ("starting worker", 3, 4), ("loading model", 4, 6), ("training", 6, 10),
        ("ending", 10, 10.5),
    ]  # fmt: skip
    [upload] = first.uploads
    assert (upload.name, upload.start - BEGAN, upload.end - BEGAN) == ("upload step 2", 8.5, 9.5)
    assert [span.name for span in second.phases] == ["launching", "starting worker", "training"]
    assert second.phases[-1].end == BEGAN + 14, "what goes on is shown as far as it is"
    assert [span.name for span in found.states] == ["queued", "provisioning"]


def test_steps_that_were_told_of_in_a_bunch_still_nest_and_keep_what_was_measured():
    found = profile(run(), TWO_ATTEMPTS)
    whole, bunched, checkpoint = found.attempts[0].phases[3].parts
    assert [(part.name, pytest.approx(part.seconds)) for part in whole.parts] == [
        ("sampling", 1.0), ("scoring", 0.2), ("update", 0.3)
    ]  # fmt: skip
    assert (bunched.start, bunched.end) == (whole.end, BEGAN + 8.1)
    assert [pytest.approx(part.seconds) for part in bunched.parts] == [0.05, 0.0, 0.05]
    assert [part.details["seconds"] for part in bunched.parts] == [0.5, 0.0, 0.5]
    assert (checkpoint.name, pytest.approx(checkpoint.seconds)) == ("checkpoint", 0.2)
    sft = found.attempts[1].phases[-1].parts[0]
    assert [(part.name, pytest.approx(part.seconds)) for part in sft.parts] == [
        ("forward and backward", 0.4), ("optimizer", 0.1)
    ]  # fmt: skip


def test_the_trace_has_whole_microseconds_from_the_submit_and_names_its_tracks():
    trace = chrome_trace(profile(run(), TWO_ATTEMPTS))
    entries = trace["traceEvents"]
    assert {entry["ph"] for entry in entries} == {"M", "X", "C", "i"}
    assert all(isinstance(entry["ts"], int) and entry["ts"] >= 0 for entry in entries if entry["ph"] != "M")
    named = {(entry["pid"], entry["tid"]) for entry in entries if entry["name"] == "thread_name"}
    assert {(entry["pid"], entry["tid"]) for entry in entries if entry["ph"] in "Xi"} <= named
    assert {entry["name"] for entry in entries if entry["ph"] == "C"} == {"reward", "loss"}
    assert trace["otherData"]["seconds"]["training: sampling"] == pytest.approx(1.05)


def test_a_run_that_still_waits_is_one_span():
    waiting = history((0, "state", None, {"to": "queued"}), (5, "warning", None, {"code": "config", "text": "hm"}))
    found = profile(run(state=RunState.QUEUED), waiting)
    assert (found.spans(), found.seconds()) == (1, {"queued": 5.0})
