"""How long things have been so, on a clock that no one can set.

Leases, stalls and graces are measured here rather than from the database's wall-clock times. A stopwatch
starts when it is first asked for, so a restarted server, or one that takes the lead, gives everything its full time
again.
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
        self._values: dict[tuple[Hashable, ...], object] = {}
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

    def unchanged(self, value: object, *key: Hashable) -> float:
        """Seconds since it was first given this value, one call after another; a new value starts it again.

        So what another server wrote counts from when it is seen here, and no two clocks are compared.
        """
        with self._lock:
            now = self._clock()
            if key not in self._values or self._values[key] != value:
                self._values[key] = value
                self._started[key] = now
            return now - self._started.setdefault(key, now)

    def keep_only(self, subjects: set[Hashable]) -> None:
        """Forgets every stopwatch whose key's first part is none of `subjects`."""
        with self._lock:
            self._started = {key: at for key, at in self._started.items() if key[0] in subjects}
            self._values = {key: value for key, value in self._values.items() if key[0] in subjects}
