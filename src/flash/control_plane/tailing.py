"""Runs' logs as they grow, read once for everybody who follows them.

Owns the pages in memory and when they are read again. A page of events never changes once it is full, so it is kept;
the last one of an open run is read again only after a commit here that touched the run, or when it is so old that
another server may have added to it. However many ask for it at that moment, one of them reads.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from flash.storage import events, runs
from flash.storage.database import Database

PAGE = 500  # events
_KEPT_CHARS = 32 << 20  # of all pages together
_KEPT_PAGES = 2000

Line = tuple[int, str]  # an event's seq, and the event as JSON


@dataclass
class _Page:
    lines: list[Line] = field(default_factory=list)
    ended: bool = False  # the run had ended when the page was read, so there is no more behind it
    read_at: float = 0.0  # monotonic; when the reading began

    @property
    def full(self) -> bool:
        return len(self.lines) >= PAGE

    @property
    def chars(self) -> int:
        return sum(len(text) for _, text in self.lines)


class Tails:
    """`old_s`: the age at which a page is no longer trusted to be all there is."""

    def __init__(self, database: Database, old_s: float) -> None:
        self._database = database
        self._old_s = old_s
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[str, int], _Page] = OrderedDict()
        self._chars = 0
        self._touched: dict[str, float] = {}  # run: when a commit last touched it; only of runs that are followed
        self._reading: dict[tuple[str, int], asyncio.Future[_Page]] = {}

    def touch(self, run_ids: set[str]) -> None:
        """To be called after each commit, on any thread, before those who wait are woken."""
        now = time.monotonic()
        with self._lock:
            for run_id in run_ids:
                if run_id in self._touched:
                    self._touched[run_id] = now

    async def after(self, run_id: str, seq: int) -> tuple[list[Line], bool]:
        """Some events behind `seq`, oldest first, and whether there will never be more behind those."""
        key = (run_id, seq // PAGE)
        page = self._known(key)
        while page is None or self._stale(run_id, page, seq):
            page = await self._read_once(key)
        fresh = [line for line in page.lines if line[0] > seq]
        return fresh, page.ended and not page.full

    def _known(self, key: tuple[str, int]) -> _Page | None:
        with self._lock:
            self._touched.setdefault(key[0], time.monotonic())
            page = self._pages.get(key)
            if page is not None:
                self._pages.move_to_end(key)
            return page

    def _stale(self, run_id: str, page: _Page, seq: int) -> bool:
        if page.full or page.ended or (page.lines and page.lines[-1][0] > seq):
            return False
        with self._lock:
            touched = self._touched.get(run_id, page.read_at)
        return touched >= page.read_at or time.monotonic() - page.read_at >= self._old_s

    async def _read_once(self, key: tuple[str, int]) -> _Page:
        """The page as somebody reads it now: whoever came first, for all who wait, even if that one leaves."""
        reading = self._reading.get(key)
        if reading is None or reading.done() or reading.get_loop() is not asyncio.get_running_loop():
            reading = self._reading[key] = asyncio.ensure_future(run_in_threadpool(self._read, *key))
            reading.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(reading)

    def _finished(self, key: tuple[str, int], reading: asyncio.Future[_Page]) -> None:
        if self._reading.get(key) is reading:
            del self._reading[key]
        if not reading.cancelled():
            reading.exception()  # seen, even if everybody has left

    def _read(self, run_id: str, index: int) -> _Page:
        began = time.monotonic()
        with self._database.read() as connection:
            ended = runs.get_run(connection, run_id).state.terminal
            found = events.read(connection, run_id, after=index * PAGE, limit=PAGE)
        lines = [(event.seq, json.dumps(event.model_dump(mode="json"), ensure_ascii=False)) for event in found]
        page = _Page(lines, ended, began)
        with self._lock:
            self._keep((run_id, index), page)
        return page

    def _keep(self, key: tuple[str, int], page: _Page) -> None:
        before = self._pages.pop(key, None)
        self._chars += page.chars - (before.chars if before else 0)
        self._pages[key] = page
        while len(self._pages) > 1 and (self._chars > _KEPT_CHARS or len(self._pages) > _KEPT_PAGES):
            old, dropped = self._pages.popitem(last=False)
            self._chars -= dropped.chars
            if not any(run_id == old[0] for run_id, _ in self._pages):
                self._touched.pop(old[0], None)
