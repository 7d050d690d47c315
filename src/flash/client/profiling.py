"""Where a run's time went: its events as a trace that ui.perfetto.dev and chrome://tracing open.

Pure: a run and its events in, the trace and its sums out. Owns the tracks and how spans nest; knows nothing of how
either was fetched. Event times are those at which the supervisor heard of something, so a step lies before the event
that reports it, as long as its own metrics say; where events came in a bunch, it is shortened to what is free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flash.records import AttemptState, AttemptView, Event, EventKind, Phase, RunState, RunStatus

PROFILED = (
    EventKind.STATE, EventKind.ATTEMPT, EventKind.PHASE, EventKind.METRICS, EventKind.CHECKPOINT, EventKind.EVAL,
    EventKind.WARNING,
)  # fmt: skip

# What a step's metrics say of its parts, in the order in which they pass. The rest of an SFT step is its gradient.
STEP_PARTS = {"seconds_sampling": "sampling", "seconds_scoring": "scoring", "seconds_update": "update"}
GRADIENT, OPTIMIZER = "forward and backward", "optimizer"
BETWEEN_STEPS = {"seconds_checkpoint": "checkpoint", "seconds_held_out": "held-out loss"}
COUNTERS = ("loss", "eval_loss", "reward", "tokens_per_s", "peak_memory_bytes")

_ATTEMPT_SPANS = {
    AttemptState.LAUNCHING: "launching",
    AttemptState.RUNNING: "starting worker",
    AttemptState.ENDING: "ending",
}
_SERVER, _PHASES, _UPLOADS = 0, 1, 2  # the process of the server's tracks; an attempt's two tracks


@dataclass
class Span:
    """What lasted from `start` to `end` (UTC seconds), and what it consisted of."""

    name: str
    category: str
    start: float
    end: float
    details: dict[str, Any] = field(default_factory=dict)
    parts: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Attempt:
    """One worker's tracks: its phases in a row, and the uploads beside them."""

    epoch: int
    device: str | None
    phases: list[Span]
    uploads: list[Span]


@dataclass
class Profile:
    """A run as spans. `instants` are warnings, `counters` are (time, name, value)."""

    run_id: str
    began: float
    states: list[Span]
    attempts: list[Attempt]
    instants: list[tuple[float, int | None, str]]
    counters: list[tuple[float, int, str, float]]

    def seconds(self) -> dict[str, float]:
        """How long the run spent in each phase, over all attempts; a phase's parts follow it as `phase: part`.

        Checkpoints and what else stands between steps are parts of `training`, as are a step's own; what is left
        of it is the time between its parts. Uploads go on beside phases and are `uploads`.
        """
        sums: dict[str, float] = defaultdict(float)
        for state in self.states:
            if state.name == RunState.QUEUED.value:
                sums["queued"] += state.seconds
        for attempt in self.attempts:
            for phase in attempt.phases:
                sums[phase.name] += phase.seconds
                for part in phase.parts:
                    for piece in part.parts or [part]:
                        sums[f"{phase.name}: {piece.name}"] += piece.seconds
            if attempt.uploads:
                sums["uploads"] += sum(upload.seconds for upload in attempt.uploads)
        return dict(sums)

    def spans(self) -> int:
        return sum(_count(track) for track in (self.states, *self._tracks()))

    def _tracks(self) -> Iterable[Sequence[Span]]:
        for attempt in self.attempts:
            yield attempt.phases
            yield attempt.uploads


def profile(run: RunStatus, events: Iterable[Event]) -> Profile:
    """`events` are the run's, of the kinds in `PROFILED`. An unfinished run is profiled up to its newest event."""
    events = sorted(events, key=lambda event: (event.time, event.seq))
    newest = max((event.time for event in events), default=run.updated_at)
    by_epoch: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.epoch is not None:
            by_epoch[event.epoch].append(event)
    views = {view.epoch: view for view in run.attempts}
    attempts = [_attempt(epoch, views.get(epoch), by_epoch[epoch], newest) for epoch in sorted(by_epoch)]
    counters = [
        (event.time, event.epoch or _SERVER, name, float(value))
        for event in events
        if event.kind is EventKind.METRICS
        for name, value in _values(event).items()
        if name in COUNTERS
    ]
    warnings = [
        (event.time, event.epoch, str(event.data.get("text") or event.data.get("code")))
        for event in events
        if event.kind is EventKind.WARNING
    ]
    return Profile(run.run_id, run.created_at, _states(events, newest), attempts, warnings, counters)


def _states(events: Sequence[Event], newest: float) -> list[Span]:
    changes = [event for event in events if event.kind is EventKind.STATE]
    marks = [
        (event.time, str(event.data.get("to")), {"reason": event.data.get("reason")})
        for event in changes
    ]
    ended = bool(marks) and RunState(marks[-1][1]).terminal
    return _in_a_row(marks[:-1] if ended else marks, marks[-1][0] if ended else newest, "state")


def _attempt(epoch: int, view: AttemptView | None, events: Sequence[Event], newest: float) -> Attempt:
    marks: list[tuple[float, str, dict[str, Any]]] = []
    ended = view.ended_at if view is not None else None
    for event in events:
        if event.kind is EventKind.ATTEMPT:
            state = event.data.get("state")
            if state in _ATTEMPT_SPANS:
                marks.append((event.time, _ATTEMPT_SPANS[AttemptState(state)], {}))
        elif event.kind is EventKind.PHASE:
            phase = str(event.data.get("phase"))
            if not marks or marks[-1][1] != phase:  # a download tells its phase again, with bytes
                marks.append((event.time, phase, {}))
    end = max(ended if ended is not None else newest, marks[-1][0] if marks else newest)
    phases = _in_a_row(marks, end, "phase")
    reported = [event for event in events if event.kind is EventKind.METRICS]
    for span in phases:
        if span.name == Phase.TRAINING.value:
            span.parts = _steps(span, [event for event in reported if span.start <= event.time <= span.end])
        elif span.name == Phase.EVALUATING.value:
            for event in events:
                if event.kind is EventKind.EVAL:
                    span.details |= event.data
    return Attempt(epoch, view.device if view else None, phases, _uploads(events))


def _in_a_row(marks: Sequence[tuple[float, str, dict[str, Any]]], end: float, category: str) -> list[Span]:
    """Spans that each last until the next one begins, the last one until `end`."""
    ends = [*(start for start, _, _ in marks[1:]), end]
    return [
        Span(name, category, start, max(start, until), details)
        for (start, name, details), until in zip(marks, ends, strict=True)
    ]


def _steps(training: Span, reported: Sequence[Event]) -> list[Span]:
    """The steps of one training phase, and the checkpoints and held-out losses between them."""
    spans: list[Span] = []
    free_from = training.start
    for event in reported:
        values = _values(event)
        step = event.data.get("step")
        for name, shown in (*BETWEEN_STEPS.items(), ("seconds", f"step {step}")):
            if name not in values:
                continue
            start = min(max(free_from, event.time - values[name]), event.time)
            category = "step" if name == "seconds" else "between steps"
            spans.append(Span(shown, category, start, event.time, {"step": step, **values}))
            free_from = event.time
            if name == "seconds":
                spans[-1].parts = _parts(spans[-1], values)
    return spans


def _parts(step: Span, values: Mapping[str, float]) -> list[Span]:
    """A step's parts, laid one behind the other; together as long as the step is drawn."""
    measured = {shown: values[name] for name, shown in STEP_PARTS.items() if name in values}
    if "seconds_optimizer" in values:
        optimizer = min(values["seconds_optimizer"], values["seconds"])
        measured = {GRADIENT: values["seconds"] - optimizer, OPTIMIZER: optimizer}
    total = max(values["seconds"], sum(measured.values()))
    parts, at = [], step.start
    for shown, seconds in measured.items():
        end = min(step.end, at + step.seconds * (seconds / total if total else 0.0))
        parts.append(Span(shown, "part of a step", at, end, {"seconds": seconds}))
        at = end
    return parts


def _uploads(events: Sequence[Event]) -> list[Span]:
    """From when a checkpoint was written, or the one before it was through, to when the server had verified it."""
    written: dict[Any, float] = {}
    spans: list[Span] = []
    for event in sorted(events, key=lambda event: (event.kind is EventKind.CHECKPOINT, event.time)):
        step = event.data.get("step")
        if event.kind is EventKind.METRICS and "seconds_checkpoint" in _values(event):
            written[step] = event.time
        elif event.kind is EventKind.CHECKPOINT:
            start = max(written.get(step, event.time), spans[-1].end if spans else 0.0)
            spans.append(Span(f"upload step {step}", "upload", min(start, event.time), event.time, dict(event.data)))
    return spans


def _values(event: Event) -> dict[str, float]:
    values = event.data.get("values")
    known = values if isinstance(values, dict) else {}
    return {str(name): float(value) for name, value in known.items() if isinstance(value, int | float)}


def _count(spans: Sequence[Span]) -> int:
    return len(spans) + sum(_count(span.parts) for span in spans)


# --- the trace's form ---------------------------------------------------------------------------------------


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """The profile in Chrome's Trace Event Format (JSON object form); times are microseconds since the submit."""
    entries: list[dict[str, Any]] = [
        *_named(_SERVER, f"run {profile.run_id}", {_PHASES: "state"}),
        *_drawn(profile, _SERVER, _PHASES, profile.states),
    ]
    for attempt in profile.attempts:
        where = f" on {attempt.device}" if attempt.device else ""
        entries += _named(
            attempt.epoch, f"attempt {attempt.epoch}{where}", {_PHASES: "phases and steps", _UPLOADS: "uploads"}
        )
        entries += _drawn(profile, attempt.epoch, _PHASES, attempt.phases)
        entries += _drawn(profile, attempt.epoch, _UPLOADS, attempt.uploads)
    for time, process, name, value in profile.counters:
        at = _microseconds(profile, time)
        entries.append({"ph": "C", "name": name, "pid": process, "ts": at, "args": {name: value}})
    for time, epoch, text in profile.instants:
        place = {"pid": epoch or _SERVER, "tid": _PHASES, "ts": _microseconds(profile, time), "s": "t"}
        entries.append({"ph": "i", "name": text, "cat": "warning", **place})
    return {
        "traceEvents": entries,
        "displayTimeUnit": "ms",
        "otherData": {"run_id": profile.run_id, "submitted_at": profile.began, "seconds": profile.seconds()},
    }


def _named(process: int, name: str, tracks: Mapping[int, str]) -> Iterable[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    for track, title in tracks.items():
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": title}}


def _drawn(profile: Profile, process: int, track: int, spans: Sequence[Span]) -> Iterable[dict[str, Any]]:
    for span in spans:
        start, end = _microseconds(profile, span.start), _microseconds(profile, span.end)
        yield {
            "ph": "X", "name": span.name, "cat": span.category, "pid": process, "tid": track, "ts": start,
            "dur": end - start, "args": span.details,
        }  # fmt: skip
        yield from _drawn(profile, process, track, span.parts)


def _microseconds(profile: Profile, time: float) -> int:
    """Both ends of every span are rounded alike, so what nests in seconds nests here."""
    return round(1e6 * (time - profile.began))
