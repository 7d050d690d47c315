"""Counts of requests: by route and status for `/metrics`, and how many refusals of one address go on record.

Counts in memory; a restarted server counts anew, as Prometheus expects of a process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

REFUSALS_A_MINUTE = 30
_ADDRESSES = 1000


class Refusals:
    """How many refusals of each address are written down. Remembers only so many addresses."""

    def __init__(self, a_minute: int = REFUSALS_A_MINUTE) -> None:
        self._a_minute = a_minute
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()  # since when, how many

    def admit(self, address: str, now: float) -> int | None:
        """None: only counted. Else how many of the minute before were only counted."""
        with self._lock:
            began, count = self._seen.pop(address, (now, 0))
            unsaid = 0
            if now - began >= 60:
                unsaid = max(0, count - self._a_minute)
                began, count = now, 0
            self._seen[address] = (began, count + 1)
            while len(self._seen) > _ADDRESSES:
                self._seen.popitem(last=False)
        return None if count >= self._a_minute else unsaid


class Requests:
    """Counts of requests by method, route and status, and their seconds, for `/metrics`. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, int], list[float]] = {}  # [requests, seconds]

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        with self._lock:
            found = self._counts.setdefault((method, route, status), [0, 0.0])
            found[0] += 1
            found[1] += seconds

    def counts(self) -> dict[tuple[str, str, int], tuple[int, float]]:
        """By method, route and status: how many, and their seconds in sum."""
        with self._lock:
            return {key: (int(count), seconds) for key, (count, seconds) in self._counts.items()}
