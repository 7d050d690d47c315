"""What a person wants to see of a run while it goes on, folded from its events; and events as plain lines.

Pure: it draws nothing, asks no server and reads no clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flash.records import AttemptState, Event, EventKind, Phase, RunStatus

RECENT_LINES = 6
RATE_WINDOW = 30  # steps that the estimate of the time left looks back on

# Metrics worth a place in one line, in this order, with the name a person reads.
HEADLINES = {
    "reward": "reward",
    "loss": "loss",
    "kl": "kl",
    "learning_rate": "lr",
    "tokens_per_s": "tokens/s",
}


@dataclass
class Progress:
    """The newest of everything. `apply` each event once, in order."""

    run_id: str
    state: str = "queued"
    reason: str = ""
    phase: str = ""
    step: int = 0
    total_steps: int | None = None
    download: str = ""
    values: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    checkpoint: str | None = None
    warnings: list[str] = field(default_factory=list)
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=RECENT_LINES))
    _steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))

    def apply(self, event: Event) -> None:
        data = event.data
        match event.kind:
            case EventKind.STATE:
                self.state, self.reason = str(data.get("to", self.state)), str(data.get("reason") or "")
            case EventKind.ATTEMPT:
                self._steps.clear()  # another attempt may go back, and at another speed
            case EventKind.PHASE:
                self.phase = str(data.get("phase", ""))
                self.download = download_text(data)
                self.total_steps = data.get("total_steps") or self.total_steps
            case EventKind.METRICS:
                self.step = int(data.get("step", self.step))
                self.total_steps = data.get("total_steps") or self.total_steps
                self.values |= data.get("values") or {}
                self._steps.append((event.time, self.step))
            case EventKind.CHECKPOINT:
                self.checkpoint = str(data.get("ref") or "")
            case EventKind.EVAL:
                self.evaluation = data
            case EventKind.WARNING:
                self.warnings.append(str(data.get("text", "")))
            case EventKind.LOG:
                self.recent.extend(line for line in str(data.get("text", "")).splitlines() if line.strip())
            case EventKind.SAMPLE:
                pass

    def seconds_left(self, now: float) -> float | None:
        """Estimated seconds until the last step, from the recent steps' pace; None before it can be known."""
        if self.total_steps is None or len(self._steps) < 2:
            return None
        (start, first), (end, last) = self._steps[0], self._steps[-1]
        if last <= first or end <= start:
            return None
        return max(0.0, (self.total_steps - last) * (end - start) / (last - first) - max(0.0, now - end))


def headline(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics that fit one line, as (name, number) in words."""
    found = {}
    for key, name in HEADLINES.items():
        value = values.get(key)
        if isinstance(value, int | float) and name not in found:
            found[name] = number(float(value), name)
    return list(found.items())


def number(value: float, name: str = "") -> str:
    if name == "tokens/s":
        return f"{value:,.0f}"
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def step_text(step: int, total: int | None) -> str:
    return f"step {step}/{total}" if total else f"step {step}"


def download_text(data: Mapping[str, Any]) -> str:
    """Of a phase that fetches something: `1.2 of 9.3 GB`; else nothing."""
    done, total = data.get("done_bytes"), data.get("total_bytes")
    if not isinstance(done, int) or not isinstance(total, int) or total <= 0:
        return ""
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    return f"{done / size:.1f} of {total / size:.1f} {unit}"


def evaluation_text(report: Mapping[str, Any]) -> str:
    base, adapter = float(report["base"]), float(report["adapter"])
    return f"base {base:.3f} → adapter {adapter:.3f} on {report['n']} held-out rows"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 04 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def events_removed(run: RunStatus) -> str | None:
    """When a run's events went and why; None: they are there."""
    if run.managed.events_removed_at is None:
        return None
    day = time.strftime("%Y-%m-%d", time.gmtime(run.managed.events_removed_at))
    return f"log, metrics and samples of {run.run_id} were removed on {day}, by the server's keep_events_days"


def plain_lines(event: Event) -> list[str]:
    """The event as lines of a log; none where it says nothing to a person."""
    data = event.data
    match event.kind:
        case EventKind.STATE:
            state, reason = data.get("to"), data.get("reason")
            return [f"{state}: {reason}" if reason and reason != state else str(state)]
        case EventKind.ATTEMPT:
            if data.get("state") != AttemptState.ENDED or not data.get("failure"):
                return []
            message = f": {data['message']}" if data.get("message") else ""
            return [f"attempt {data.get('epoch')} ended ({data['failure']}){message}"]
        case EventKind.PHASE:
            if text := download_text(data):
                return [f"{data.get('phase')}: {text} fetched"]
            known = data.get("total_steps") and data.get("phase") == Phase.TRAINING
            return [f"{data.get('phase')} ({data['total_steps']} steps)" if known else str(data.get("phase"))]
        case EventKind.METRICS:
            parts = [f"{name} {value}" for name, value in headline(data.get("values") or {})]
            if not parts:
                return []
            return ["  ".join([step_text(int(data.get("step", 0)), data.get("total_steps")), *parts])]
        case EventKind.CHECKPOINT:
            return [f"checkpoint {data.get('ref')}"]
        case EventKind.EVAL:
            return [f"evaluation: {evaluation_text(data)}"]
        case EventKind.WARNING:
            return [f"warning: {data.get('text')}"]
        case EventKind.LOG:
            prefix = "environment | " if data.get("stream") == "environment" else ""
            return [f"{prefix}{line}" for line in str(data.get("text", "")).splitlines()]
        case EventKind.SAMPLE:
            return []
