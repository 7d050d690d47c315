"""Requests on their way through this server to engines: how many are open, how they ended, how long they took.

Counts in memory, for the reconciler (an engine with an open request is not idle), for the limit on open requests
and for `/metrics`. A restarted server counts anew, as Prometheus expects of a process.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flash.control_plane.stopwatches import Stopwatches
from flash.errors import Busy

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Histogram:
    """Seconds, as Prometheus counts them: `counts[i]` are those at or below `BUCKETS_S[i]` and above the one before."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total_s += seconds


class Traffic:
    """Safe from several threads."""

    def __init__(self, stopwatches: Stopwatches, limit: int) -> None:
        self._stopwatches = stopwatches
        self._limit = limit
        self._lock = threading.Lock()
        self._open = 0
        self._by_engine: Counter[str] = Counter()
        self._answers: Counter[tuple[str, str, int]] = Counter()  # by org, path, status
        self._seconds: dict[tuple[str, str], Histogram] = {}  # by org, path

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among the open requests; Busy when there is none."""
        with self._lock:
            if self._open >= self._limit:
                raise Busy(f"{self._limit} requests are open", remedy="try again in a moment")
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    @contextmanager
    def using(self, engine_id: str) -> Iterator[None]:
        """Keeps the engine from being idle."""
        with self._lock:
            self._by_engine[engine_id] += 1
        self._stopwatches.restart(engine_id, "used")
        try:
            yield
        finally:
            with self._lock:
                self._by_engine[engine_id] -= 1
                if not self._by_engine[engine_id]:
                    del self._by_engine[engine_id]
            self._stopwatches.restart(engine_id, "used")

    def open_on(self, engine_id: str) -> int:
        with self._lock:
            return self._by_engine[engine_id]

    def record(self, org: str, path: str, status: int, seconds: float) -> None:
        with self._lock:
            self._answers[org, path, status] += 1
            self._seconds.setdefault((org, path), Histogram()).add(seconds)

    def answers(self, org: str) -> dict[tuple[str, int], int]:
        """Requests answered, by path and status."""
        with self._lock:
            return {(path, status): n for (whose, path, status), n in self._answers.items() if whose == org}

    def seconds(self, org: str) -> dict[str, Histogram]:
        """Seconds from a request's arrival to the end of its answer, by path."""
        with self._lock:
            return {
                path: Histogram(list(found.counts), found.total_s)
                for (whose, path), found in self._seconds.items()
                if whose == org
            }
