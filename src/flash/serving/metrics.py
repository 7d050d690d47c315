"""Counters and histograms of one engine host, in Prometheus' text format.

Hand-written: the format is lines of `name{labels} value`, and this process has few of them. Nothing here knows
what is counted.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """Rises only; one value for each set of labels."""

    kind = "counter"

    def __init__(self, name: str, words: str) -> None:
        self.name, self.words = name, words
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1.0, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + amount

    def lines(self) -> Iterable[str]:
        with self._lock:
            values = sorted(self._values.items())
        return [_line(self.name, labels, value) for labels, value in values]


class Histogram:
    """Durations in seconds."""

    kind = "histogram"

    def __init__(self, name: str, words: str) -> None:
        self.name, self.words = name, words
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(_SECONDS, seconds)] += 1
            self._sum += seconds

    def lines(self) -> Iterable[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*_SECONDS, math.inf), counts, strict=True):
            below += count
            label = "+Inf" if bound == math.inf else f"{bound:g}"
            yield _line(f"{self.name}_bucket", (("le", label),), below)
        yield _line(f"{self.name}_sum", (), total)
        yield _line(f"{self.name}_count", (), below)


def exposition(metrics: Iterable[Counter | Histogram], values: Mapping[str, float]) -> str:
    """The page: `metrics`, then `values` by name, those that end in `_total` as counters and the others as gauges."""
    lines: list[str] = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.words}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    for name, value in sorted(values.items()):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE {name} {kind}", _line(name, (), value)]
    return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{written}}} {value:.17g}" if written else f"{name} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
