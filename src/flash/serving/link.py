"""The host's tie to the control plane: heartbeats that keep it wanted, its end when it isn't, or can't know, and the
addresses that it reads adapters by.

Owns the heartbeat thread and the clock of the lease, which is monotonic and in this process. Knows nothing of
engines and requests: it is given what to tell, and tells when to drain.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import ValidationError

from flash.errors import FlashError, NotFound, Unavailable, from_wire
from flash.records import SignAnswer
from flash.serving.hello import AddressRequest, EngineAnswer, EngineHeartbeat, EngineHello, EngineState

UNWANTED, UNREACHABLE = 3, 4  # exit statuses
_UNWANTED = frozenset({401, 403, 404, 409})
_ADDRESSES_S = 15.0  # for an answer with addresses


@dataclass(frozen=True)
class Vitals:
    """What a heartbeat tells of a host that serves."""

    stats: Mapping[str, float] = field(default_factory=dict)
    idle_s: float = 0.0
    in_flight: int = 0


class Link(threading.Thread):
    """Beats until `end`. Calls `on_drain` once, when the plane wants it or the host has been idle for `idle_s`;
    `on_lost(status, reason)` when the host must be gone at once. Both come on this thread.
    """

    def __init__(
        self, hello: EngineHello, *, on_drain: Callable[[], None], on_lost: Callable[[int, str], None]
    ) -> None:
        super().__init__(name="link", daemon=True)
        self._hello = hello
        self._on_drain = on_drain
        self._on_lost = on_lost
        self._state: EngineState = "loading"
        self._url: str | None = None
        self._vitals: Callable[[], Vitals] = Vitals
        self._until = time.monotonic() + hello.lease_s
        self._drained = False
        self._changed = threading.Event()
        self._ending = threading.Event()
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {hello.token}"},
            trust_env=False,  # a proxy meant for the user's own traffic must not see the engine's token
        )

    def ready(self, url: str, vitals: Callable[[], Vitals]) -> None:
        self._url, self._vitals = url, vitals
        self._tell("ready")

    def leaving(self) -> None:
        self._tell("leaving")

    def end(self, state: EngineState, error: FlashError | None = None) -> None:
        """The last word; a plane that can't be reached now will learn it from the silence."""
        self._state = state
        self._ending.set()
        self._changed.set()
        self.join()
        try:
            self._beat(timeout_s=min(self._hello.lease_s, 10.0), error=error)
        except httpx.HTTPError:
            pass
        finally:
            self._http.close()

    def addresses(self, keys: Sequence[str]) -> Sequence[str]:
        """An address in the bucket to read each of these objects by; from any thread. NotFound: the plane knows no such
        adapter. Unavailable: it gives none, for whatever other reason."""
        try:
            answer = self._post("urls", AddressRequest(keys=tuple(keys)).model_dump_json(), timeout_s=_ADDRESSES_S)
            if answer.is_success:
                return SignAnswer.model_validate_json(answer.content).urls
            refusal = from_wire(answer.json()["error"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"the control plane gave no address: {error or type(error).__name__}") from error
        raise refusal if isinstance(refusal, NotFound) else Unavailable(f"the control plane gave no address: {refusal}")

    def run(self) -> None:
        while not self._ending.is_set():
            sent = time.monotonic()
            left = self._until - sent
            if left <= 0:
                self._on_lost(UNREACHABLE, f"the control plane has not answered for {self._hello.lease_s:g} s")
                return
            self._changed.clear()
            try:
                answer = self._beat(timeout_s=max(left / 2, 0.05))  # a beat that hangs leaves room for another
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code in _UNWANTED:
                self._on_lost(UNWANTED, f"the control plane wants this engine no more ({answer.status_code})")
                return
            if answer is not None and answer.is_success:
                self._until = sent + self._hello.lease_s  # the plane's own clock started later
                self._heed(answer)
            wait = self._hello.heartbeat_s if answer is not None else self._hello.heartbeat_s / 2
            self._changed.wait(max(min(wait, self._until - time.monotonic()), 0.0))

    def _tell(self, state: EngineState) -> None:
        self._state = state
        self._changed.set()

    def _beat(self, *, timeout_s: float, error: FlashError | None = None) -> httpx.Response:
        vitals = self._vitals()
        beat = EngineHeartbeat(
            state=self._state,
            pid=os.getpid(),
            url=self._url,
            error=error.to_wire() if error is not None else None,
            stats=dict(vitals.stats),
            idle_s=vitals.idle_s,
            in_flight=vitals.in_flight,
        )
        return self._post("heartbeat", beat.model_dump_json(), timeout_s=timeout_s)

    def _post(self, what: str, content: str, *, timeout_s: float) -> httpx.Response:
        return self._http.post(
            f"{self._hello.plane_url.rstrip('/')}/worker/engines/{self._hello.engine_id}/{what}",
            content=content,
            headers={"Content-Type": "application/json"},
            timeout=timeout_s,
        )

    def _heed(self, answer: httpx.Response) -> None:
        try:
            wanted: Any = EngineAnswer.model_validate_json(answer.content).desired
        except ValidationError:
            return  # not from a plane that knows engines; the lease runs on
        idle = 0 < self._hello.idle_s <= self._vitals().idle_s and self._state == "ready"
        if (wanted == "drain" or idle) and not self._drained:
            self._drained = True
            self._on_drain()
