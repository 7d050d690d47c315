"""How long things have been so, on a clock that no one can set.

Leases, stalls and graces are measured here rather than from the database's wall-clock times. A stopwatch
starts when it is first asked for, so a restarted server gives everything its full time again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable


class Stopwatches:
    """Seconds by key. Safe from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: dict[tuple[Hashable, ...], float] = {}
        self._lock = threading.Lock()

    def elapsed(self, *key: Hashable) -> float:
        """Seconds since the stopwatch was started; the first call starts it."""
        with self._lock:
            now = self._clock()
            return now - self._started.setdefault(key, now)

    def restart(self, *key: Hashable) -> float:
        """Starts it again and returns what it showed (0 if it was not running)."""
        with self._lock:
            now = self._clock()
            before = self._started.get(key, now)
            self._started[key] = now
            return now - before

    def keep_only(self, subjects: set[Hashable]) -> None:
        """Forgets every stopwatch whose key's first part is none of `subjects`."""
        with self._lock:
            self._started = {key: at for key, at in self._started.items() if key[0] in subjects}
