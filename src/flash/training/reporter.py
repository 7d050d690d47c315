"""What training tells the world, and the one question it asks back: should I stop?

Training sees no storage and no network: it gets a `Reporter` and a directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from flash.records import EvalReport, Phase


class Reporter(Protocol):
    def phase(self, phase: Phase, *, total_steps: int | None = None) -> None: ...

    def progress(self) -> None:
        """Something moved forward (a batch loaded, a token decoded): keeps the stall deadline away."""

    def log(self, text: str) -> None: ...

    def warn(self, code: str, text: str) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def checkpoint(
        self, folder: Path, *, step: int, final: bool, metrics: Mapping[str, float], seconds: float
    ) -> None:
        """A complete checkpoint folder, never written again, and how long training stood still for it; returns at
        once (uploads go on elsewhere)."""

    def evaluation(self, report: EvalReport) -> None: ...

    def sample(self, step: int, sample: Mapping[str, Any]) -> None: ...

    def should_stop(self) -> bool:
        """True once the run was cancelled or ran into its limit: save a checkpoint and return."""


class RecordingReporter:
    """Keeps every report in memory, in order; asks to stop once step `stop_at` was reported."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.progressed = 0
        self._stop_at = stop_at

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for reported, data in self.reports if reported == kind]

    def phase(self, phase: Phase, *, total_steps: int | None = None) -> None:
        self.reports.append(("phase", {"phase": phase, "total_steps": total_steps}))

    def progress(self) -> None:
        self.progressed += 1

    def log(self, text: str) -> None:
        self.reports.append(("log", {"text": text}))

    def warn(self, code: str, text: str) -> None:
        self.reports.append(("warning", {"code": code, "text": text}))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.reports.append(("metrics", {"step": step, "values": dict(values)}))

    def checkpoint(
        self, folder: Path, *, step: int, final: bool, metrics: Mapping[str, float], seconds: float
    ) -> None:
        data = {"folder": folder, "step": step, "final": final, "metrics": dict(metrics), "seconds": seconds}
        self.reports.append(("checkpoint", data))

    def evaluation(self, report: EvalReport) -> None:
        self.reports.append(("evaluation", {"report": report}))

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        self.reports.append(("sample", {"step": step, "sample": dict(sample)}))

    def should_stop(self) -> bool:
        return self._stop_at is not None and any(
            data["step"] >= self._stop_at for data in self.of("metrics")
        )
