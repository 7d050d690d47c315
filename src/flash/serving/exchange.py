"""One request between the event loop, where its answer is written, and the engine's thread, where tokens come from.

Owns how news crosses threads, how much of it waits for a slow reader, and that an end, of whatever kind, cancels
what is unfinished and lets the adapter go. Knows neither what is asked nor what is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

from flash.inference.engine import Failed, Prefilled, Request, Sampled, ServingEngine, Sink, Ticket
from flash.serving.adapters import Held
from flash.serving.openai import ApiError

News = Prefilled | Sampled | Failed


class Mailbox:
    """Carries news to the event loop. One wake-up carries all that is there: waking costs more than posting."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[Exchange, int, News]] = deque()
        self._waking = False

    def sink(self, exchange: Exchange, number: int) -> Sink:
        """Where the engine tells of request `number` of an exchange; for any thread."""

        def post(news: News) -> None:
            self._posted.append((exchange, number, news))
            if not self._waking:
                self._waking = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                    self._loop.call_soon_threadsafe(self._deliver)

        return post

    def _deliver(self) -> None:
        self._waking = False  # first: what is posted from here on wakes again
        while self._posted:
            exchange, number, news = self._posted.popleft()
            exchange.put(number, news)


class Traffic:
    """How many exchanges are open, and for how long there has been none."""

    def __init__(self) -> None:
        self._idle_since = time.monotonic()
        self.in_flight = 0
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def idle_s(self) -> float:
        return 0.0 if self.in_flight else time.monotonic() - self._idle_since

    def enter(self) -> None:
        self.in_flight += 1
        self.empty.clear()

    def leave(self) -> None:
        self.in_flight -= 1
        self._idle_since = time.monotonic()
        if not self.in_flight:
            self.empty.set()


class Exchange:
    """A request in flight. `close` ends it, at whatever point it is; more than once is fine.

    A slow reader doesn't slow the others down, nor does it fill the memory: news waits for it up to
    `unread_tokens` (an alternative counts as a token), then the request is cancelled, and the reader finds an
    error after what waited.
    """

    def __init__(self, traffic: Traffic, mailbox: Mailbox, *, unread_tokens: int) -> None:
        self._traffic = traffic
        self._mailbox = mailbox
        self._unread_tokens = unread_tokens
        self._unread = 0
        self._news: list[tuple[int, News]] = []
        self._arrived = asyncio.Event()
        self._tickets: list[Ticket] = []
        self._closing: list[Callable[[], None]] = []
        self._too_slow = False
        self._closed = False
        self.held: Held | None = None
        self.began = time.monotonic()
        traffic.enter()

    def submit(self, engine: ServingEngine, requests: list[Request]) -> None:
        """Raises what the engine raises; then nothing of it runs on after `close`."""
        for number, request in enumerate(requests):
            self._tickets.append(engine.submit(request, self._mailbox.sink(self, number)))

    def put(self, number: int, news: News) -> None:
        if self._closed or self._too_slow:
            return
        if isinstance(news, Sampled):
            self._unread += 1 + len(news.scored.top)
        self._news.append((number, news))
        if self._unread > self._unread_tokens:
            self._too_slow = True
            self._cancel()
        self._arrived.set()

    async def next(self) -> list[tuple[int, News]]:
        """All that arrived since the last call, at least one piece. Raises ApiError after a slow reader's last."""
        await self._arrived.wait()
        if not self._news:
            raise ApiError(
                "the answer was cancelled: it was read too slowly", status=408, type="server_error", code="slow_reader"
            )
        news, self._news, self._unread = self._news, [], 0
        if not self._too_slow:
            self._arrived.clear()
        return news

    def on_close(self, action: Callable[[], None]) -> None:
        self._closing.append(action)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._cancel()
        if self.held is not None:
            self.held.release()
        for action in self._closing:
            action()
        self._traffic.leave()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()
