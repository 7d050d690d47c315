"""A thin client of the worker API: one method a request, typed records in and out.

Owns the HTTP and what may be repeated; knows nothing of leases, processes or what the answers mean for the
attempt. Errors come out as `flash.errors`: `Conflict` and `Unauthorized` say that this attempt no longer
counts, `Unavailable` that the plane can't be reached now.

What is repeated: `claim` here, which the plane answers anew to the same process until its first heartbeat, and
whatever a caller wraps in `persist`. Heartbeats are repeated by their own loop. Events de-duplicate by `n`;
reports and `finish` are the same however often they arrive.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx

from flash.errors import Conflict, FlashError, Unauthorized, Unavailable, from_wire
from flash.records import (
    CheckpointReport,
    Claim,
    EventAck,
    EventBatch,
    Finish,
    Heartbeat,
    HeartbeatAnswer,
    Record,
    SignAnswer,
    SignRequest,
)
from flash.worker.settings import WorkerSettings

Answer = TypeVar("Answer")


def backoff(settings: WorkerSettings) -> Iterator[float]:
    """Waits in seconds before each repeat: doubling, capped, with up to 25% of jitter."""
    wait = settings.retry_first_s
    while True:
        yield wait * (1 + random.random() / 4)
        wait = min(wait * 2, settings.retry_most_s)


def persist(
    attempt: Callable[[], Answer],
    settings: WorkerSettings,
    *,
    patience_s: float | None,
    stop: threading.Event,
) -> Answer:
    """Repeats `attempt` while it is Unavailable, for `patience_s` (None: for ever) or until `stop` is set."""
    deadline = None if patience_s is None else time.monotonic() + patience_s
    for wait in backoff(settings):
        try:
            return attempt()
        except Unavailable:
            if deadline is not None and time.monotonic() + wait > deadline:
                raise
            if stop.wait(wait):
                raise
    raise AssertionError("back-off never ends")


class WorkerApi:
    """The worker API, seen from one attempt. Safe to use from several threads."""

    def __init__(self, api_url: str, attempt_id: str, token: str, settings: WorkerSettings) -> None:
        self._settings = settings
        self._http = httpx.Client(
            base_url=f"{api_url.rstrip('/')}/worker/attempts/{attempt_id}/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(settings.request_timeout_s, connect=settings.connect_timeout_s),
            verify=not api_url.startswith("http://"),  # certificates take 40 ms to read: not where none is met
            trust_env=False,  # a proxy meant for the user's own traffic must not see the attempt's token
        )

    def claim(self, *, pid: int, device: str, stop: threading.Event | None = None) -> Claim:
        """Takes the attempt; patient, since the plane may be starting."""

        def ask() -> Claim:
            answer = self._request("POST", "claim", json={"pid": pid, "device": device})
            return Claim.model_validate_json(answer.content)

        return persist(
            ask,
            self._settings,
            patience_s=self._settings.claim_patience_s,
            stop=stop or threading.Event(),
        )

    def heartbeat(self, beat: Heartbeat, *, timeout_s: float) -> HeartbeatAnswer:
        """One beat; never repeated here and never longer than `timeout_s` an operation."""
        return HeartbeatAnswer.model_validate_json(self._post("heartbeat", beat, timeout_s=timeout_s).content)

    def send_events(self, batch: EventBatch) -> EventAck:
        return EventAck.model_validate_json(self._post("events", batch).content)

    def report_checkpoint(self, report: CheckpointReport) -> None:
        self._post("checkpoints", report)

    def sign(self, request: SignRequest) -> tuple[str, ...]:
        """An address in the bucket for each key."""
        return SignAnswer.model_validate_json(self._post("urls", request).content).urls

    def finish(self, finish: Finish) -> None:
        self._post("finish", finish)

    def environment_archive(self) -> bytes:
        """The pinned version's archive, at most 64 MB by the hub's own cap."""
        return self._request("GET", "environment").content

    def close(self) -> None:
        self._http.close()

    def _post(self, path: str, body: Record, *, timeout_s: float | None = None) -> httpx.Response:
        return self._request("POST", path, content=body.model_dump_json(), timeout_s=timeout_s)

    def _request(
        self,
        method: str,
        path: str,
        *,
        content: str | None = None,
        json: object | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        request = self._http.build_request(
            method,
            path,
            content=content,
            json=json,
            headers={"Content-Type": "application/json"} if content is not None else None,
            timeout=httpx.Timeout(timeout_s) if timeout_s is not None else httpx.USE_CLIENT_DEFAULT,
        )
        try:
            response = self._http.send(request)
        except httpx.ConnectError as error:
            raise Unavailable(f"the control plane can't be reached at {request.url.host}: {error}") from error
        except httpx.TransportError as error:
            raise Unavailable(f"the control plane did not answer {method} {path}: {error!r}") from error
        if response.is_success:
            return response
        raise _error(response, f"{method} {path}")


def _error(response: httpx.Response, request: str) -> FlashError:
    """The plane's own error where it sent one; else the nearest class for the status."""
    status = response.status_code
    try:
        wire = response.json()["error"]
        error = from_wire(wire)
    except (ValueError, KeyError, TypeError, AttributeError):
        error = FlashError(f"the control plane answered {request} with {status}")
    if status == Conflict.status:
        return Conflict(error.message, remedy=error.remedy)
    if status in (Unauthorized.status, 403):
        return Unauthorized(error.message, remedy=error.remedy)
    if status >= 500 or status in (408, 429):
        return Unavailable(error.message, remedy=error.remedy)
    return error
