"""Wakes event streams when a run changes, from whichever thread committed the change."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Followers:
    def __init__(self) -> None:
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def follow(self, run_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change of the run while the block lasts. Call it on the loop's thread."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiting.setdefault(run_id, set()).add(entry)
            if self._closed:
                entry[1].set()
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._waiting[run_id].discard(entry)
                if not self._waiting[run_id]:
                    del self._waiting[run_id]

    def notify(self, run_ids: set[str]) -> None:
        with self._lock:
            entries = [entry for run_id in run_ids for entry in self._waiting.get(run_id, ())]
        _set(entries)

    def close(self) -> None:
        """Wakes every stream for the last time: the server is stopping."""
        with self._lock:
            self._closed = True
            entries = [entry for group in self._waiting.values() for entry in group]
        _set(entries)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def count(self) -> int:
        with self._lock:
            return sum(len(group) for group in self._waiting.values())


def _set(entries: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    for loop, event in entries:
        with contextlib.suppress(RuntimeError):  # that loop has ended
            loop.call_soon_threadsafe(event.set)
