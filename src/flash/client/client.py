"""`FlashClient`: the control plane's HTTP API as typed methods over the records.

Owns timeouts, retries of what is safe to repeat, error translation and the resuming event stream.
Knows nothing of how the server was found or started: whoever builds a client may pass `recover`, which is
called when the server can't be reached and may bring it back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import ValidationError

from flash import errors
from flash.errors import FlashError, InternalError, Unavailable
from flash.records import (
    Checkpoint,
    DeployAnswer,
    Deployment,
    DeployRequest,
    EnvironmentVersion,
    Event,
    EventKind,
    KeepRequest,
    Manifest,
    Priority,
    PriorityRequest,
    Record,
    RetryRequest,
    RunState,
    RunStatus,
    RunSummary,
    SubmitRequest,
)

RETRY_DELAYS_S = (0.1, 0.4, 1.0)
RETRIED_STATUSES = frozenset({502, 503, 504})
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
DEPLOY_TIMEOUT_S = 600.0  # a smoke completion may have to fetch its adapter first
CHAT_SILENCE_S = 900.0  # an engine may have to start, and a queue to pass
STREAM_SILENCE_S = 45.0  # the server pings an idle stream every 15 s
EVENT_PAGE = 1000
TERMINAL = frozenset(state.value for state in RunState if state.terminal)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Identity:
    org: str
    role: str
    server: str


@dataclass(frozen=True)
class ChatStream:
    """A chat completion as it comes: OpenAI's chunks, and the step that answers (None: a bare base)."""

    checkpoint: str | None
    chunks: Iterator[dict[str, Any]]


class FlashClient:
    """A synchronous client; use it as a context manager, or call `close`.

    Every method raises the `FlashError` that the server described, or `Unavailable` when the server can't be
    reached; GETs and idempotent requests are repeated a few times before that.
    """

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        unreachable_remedy: str = "check the address, and that the server runs",
        recover: Callable[[], None] | None = None,
        retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._remedy = unreachable_remedy
        self._recover = recover
        self._delays = retry_delays_s
        url = httpx.URL(self.base_url)
        loopback = url.host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            verify=not (loopback and url.scheme == "http"),  # certificates take 40 ms to read: not where none is met
            trust_env=not loopback,  # a proxy must never stand between the CLI and its own machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- the server ---------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """`{status, version, pid, sqlite_version}`; needs no token."""
        return self._json("GET", "/api/health")

    def whoami(self) -> Identity:
        answer = self._json("GET", "/api/whoami")
        return Identity(org=str(answer["org"]), role=str(answer["role"]), server=str(answer["server"]))

    def hardware(self) -> list[dict[str, Any]]:
        """What runs can be placed on: `{device, name, kind, memory_bytes, usd_per_hour}` for each device."""
        return list(self._json("GET", "/api/hardware")["devices"])

    def page(self, run_id: str) -> str:
        """The address of a run's page in the dashboard."""
        return f"{self.base_url}/dashboard/runs/{_part(run_id)}"

    def dashboard_link(self, run_id: str | None = None) -> str:
        """An address that lets one browser in with this client's key: once, for about two minutes."""
        code = str(self._json("POST", "/api/dashboard/links")["code"])
        page = self.page(run_id) if run_id else f"{self.base_url}/dashboard"
        return f"{page}#code={code}"

    def stop_server(self) -> None:
        self._send("POST", "/api/server/stop", safe=False)

    # --- runs ---------------------------------------------------------------------------------------

    def submit(self, request: SubmitRequest, *, idempotency_key: str | None = None) -> RunStatus:
        """Submits a run; repeated with one key when the connection fails, so at most one run comes of it."""
        key = idempotency_key or uuid.uuid4().hex
        body = request.model_dump(mode="json")
        return self._record(RunStatus, "POST", "/api/runs", json=body, headers={"Idempotency-Key": key}, safe=True)

    def runs(self, *, limit: int = 50, before: str | None = None) -> list[RunSummary]:
        """Runs, newest first; `before` is the run id to continue after."""
        params: dict[str, Any] = {"limit": limit} | ({"before": before} if before else {})
        return self._records(RunSummary, "runs", "GET", "/api/runs", params=params)

    def run(self, run_id: str) -> RunStatus:
        return self._record(RunStatus, "GET", f"/api/runs/{_part(run_id)}")

    def cancel(self, run_id: str) -> RunStatus:
        return self._record(RunStatus, "POST", f"/api/runs/{_part(run_id)}/cancel", safe=True)

    def retry(self, run_id: str, secrets: Mapping[str, str], *, idempotency_key: str | None = None) -> RunStatus:
        """A new run from the exact state of a failed or cancelled one; at most one comes of a call."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        body = RetryRequest(secrets=dict(secrets)).model_dump(mode="json")
        path = f"/api/runs/{_part(run_id)}/retry"
        return self._record(RunStatus, "POST", path, json=body, headers=headers, safe=True)

    def keep(self, run_id: str, *, pinned: bool, days: float | None) -> RunStatus:
        """How long the run's files are kept after its end."""
        body = KeepRequest(pinned=pinned, days=days).model_dump(mode="json")
        return self._record(RunStatus, "POST", f"/api/runs/{_part(run_id)}/keep", json=body, safe=True)

    def set_priority(self, run_id: str, priority: Priority) -> RunStatus:
        """Its place among its org's own runs."""
        body = PriorityRequest(priority=priority).model_dump(mode="json")
        return self._record(RunStatus, "POST", f"/api/runs/{_part(run_id)}/priority", json=body, safe=True)

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Complete, verified checkpoints, oldest first."""
        path = f"/api/runs/{_part(run_id)}/checkpoints"
        return self._records(Checkpoint, "checkpoints", "GET", path)

    # --- events -------------------------------------------------------------------------------------

    def events(
        self, run_id: str, *, after: int = 0, kinds: tuple[EventKind, ...] = (), limit: int = EVENT_PAGE
    ) -> list[Event]:
        """One page of the run's history: events with `seq > after`, in order."""
        params: dict[str, Any] = {"after": after, "limit": limit}
        if kinds:
            params["kinds"] = ",".join(kinds)
        return self._records(Event, "events", "GET", f"/api/runs/{_part(run_id)}/events", params=params)

    def history(self, run_id: str, *, after: int = 0, kinds: tuple[EventKind, ...] = ()) -> Iterator[Event]:
        """Every event so far, page by page."""
        while page := self.events(run_id, after=after, kinds=kinds):
            yield from page
            after = page[-1].seq

    def follow(self, run_id: str, *, after: int = 0, patience_s: float = 120.0) -> Iterator[Event]:
        """Events after `after`, live, each exactly once and in order, until the run's terminal state.

        A broken connection is taken up again where it broke, and `recover` may bring the server back. A server
        that was stopped in good order is left alone where someone could bring it back. Raises `Unavailable`
        then, and when the server stays out of reach for `patience_s` seconds.
        """
        last = after
        give_up_at: float | None = None
        in_good_order = False
        while True:
            try:
                for event in self._stream(run_id, last):
                    give_up_at = None
                    if event.seq <= last:
                        continue
                    if event.seq > last + 1:  # the stream skipped some: fetch them before going on
                        for missing in self.history(run_id, after=last):
                            if missing.seq >= event.seq:
                                break
                            last = missing.seq
                            yield missing
                    last = event.seq
                    yield event
                    if ends_run(event):
                        return
                in_good_order = True
                if self._is_over(run_id, last):
                    return
                in_good_order = False
            except (httpx.TransportError, Unavailable) as error:
                if in_good_order and self._recover is not None:
                    raise Unavailable(
                        f"the server at {self.base_url} was stopped",
                        remedy=f"the run is taken up when it starts again: flash status {run_id} -f",
                    ) from error
                now = time.monotonic()
                give_up_at = give_up_at or now + patience_s
                if now >= give_up_at:
                    raise self._unreachable(error) from error
                self._try_to_recover()
            time.sleep(0.2)

    def _is_over(self, run_id: str, last: int) -> bool:
        """Whether the run has ended and `last` was its last event; never brings the server back."""
        answer = self._http.get(f"/api/runs/{_part(run_id)}")
        if not answer.is_success:
            raise self._error(answer)
        run = self._parse(RunStatus, answer.json())
        return run.state.terminal and not self.events(run_id, after=last, limit=1)

    def _stream(self, run_id: str, after: int) -> Iterator[Event]:
        """One connection's worth of server-sent events."""
        path = f"/api/runs/{_part(run_id)}/events/stream"
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream("GET", path, params={"after": after}, headers=headers, timeout=timeout) as answer:
            if answer.status_code != httpx.codes.OK:
                answer.read()
                raise self._error(answer)
            data: list[str] = []
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    data.append(line.removeprefix("data:").removeprefix(" "))
                elif not line and data:
                    yield self._parse(Event, json.loads("\n".join(data)))
                    data = []

    # --- adapters -----------------------------------------------------------------------------------

    def adapter(self, run_id: str, *, step: int | None = None) -> Manifest:
        """The adapter's files at `step`, or the run's final ones."""
        return self._record(Manifest, "GET", f"/api/runs/{_part(run_id)}/adapter", params=_step(step))

    def adapter_file(self, run_id: str, path: str, *, step: int | None = None) -> Iterator[bytes]:
        """The bytes of one file that the manifest names."""
        url = f"/api/runs/{_part(run_id)}/adapter/files/{path}"
        try:
            with self._http.stream("GET", url, params=_step(step)) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise self._error(answer)
                yield from answer.iter_bytes()
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    # --- deployments --------------------------------------------------------------------------------

    def deploy(self, request: DeployRequest) -> DeployAnswer:
        """One step towards a deployment: `waiting` means that the same call goes on from there."""
        body = request.model_dump(mode="json")
        timeout = httpx.Timeout(DEPLOY_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return self._record(DeployAnswer, "POST", "/api/deployments", json=body, timeout=timeout, safe=True)

    def deployments(self) -> list[Deployment]:
        """What is live, newest first."""
        return self._records(Deployment, "deployments", "GET", "/api/deployments")

    def undeploy(self, run_id: str) -> Deployment:
        """Takes the run's name back; what it answered with until now."""
        return self._record(Deployment, "DELETE", f"/api/deployments/{_part(run_id)}", safe=False)

    @contextmanager
    def chat(self, request: Mapping[str, Any]) -> Iterator[ChatStream]:
        """A streamed chat completion (OpenAI's request). Leaving the block early cancels it on the server."""
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        timeout = httpx.Timeout(CHAT_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise self._error(answer)
                yield ChatStream(answer.headers.get("X-Freesolo-Checkpoint"), self._chunks(answer))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _chunks(self, answer: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in answer.iter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise errors.from_wire(chunk["error"])
            yield chunk
        raise Unavailable("the answer broke off", remedy="ask again")

    # --- environments -------------------------------------------------------------------------------

    def push_environment(self, namespace: str, name: str, archive: bytes) -> EnvironmentVersion:
        """Ships an archive; the same content again gives the same version, so this is safe to repeat."""
        path = f"/api/environments/{_part(namespace)}/{_part(name)}"
        headers = {"Content-Type": "application/gzip"}
        return self._record(EnvironmentVersion, "POST", path, content=archive, headers=headers, safe=True)

    def environments(self) -> list[EnvironmentVersion]:
        """The newest version of each environment."""
        return self._records(EnvironmentVersion, "environments", "GET", "/api/environments")

    def environment_archive(self, namespace: str, name: str, *, version: str | None = None) -> bytes:
        path = f"/api/environments/{_part(namespace)}/{_part(name)}/archive"
        return self._send("GET", path, params={"version": version} if version else None).content

    def delete_environment(self, namespace: str, name: str) -> None:
        self._send("DELETE", f"/api/environments/{_part(namespace)}/{_part(name)}", safe=False)

    # --- requests -----------------------------------------------------------------------------------

    def _record(self, kind: type[R], method: str, path: str, **request: Any) -> R:
        return self._parse(kind, self._json(method, path, **request))

    def _records(self, kind: type[R], key: str, method: str, path: str, **request: Any) -> list[R]:
        return [self._parse(kind, item) for item in self._json(method, path, **request)[key]]

    def json(self, method: str, path: str, below: str | None = None, **request: Any) -> dict[str, Any]:
        """An answer's JSON as it is, for calls that have no method here; `below` is one more segment of the path."""
        return self._json(method, path if below is None else f"{path}/{_part(below)}", **request)

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        answer = self._send(method, path, **request)
        try:
            body = answer.json()
        except ValueError as error:
            raise self._strange(f"{method} {path} gave no JSON") from error
        if not isinstance(body, dict):
            raise self._strange(f"{method} {path} gave a {type(body).__name__}")
        return body

    def _send(self, method: str, path: str, *, safe: bool | None = None, **request: Any) -> httpx.Response:
        """The server's good answer. `safe`: may be repeated; by default, GETs are."""
        delays = self._delays if (method == "GET" if safe is None else safe) else ()
        for delay in (*delays, None):
            try:
                answer = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                if delay is None:
                    raise self._unreachable(error) from error
                self._try_to_recover()
            else:
                if delay is None or answer.status_code not in RETRIED_STATUSES:
                    break
            time.sleep(delay)
        if answer.is_success:
            return answer
        raise self._error(answer)

    def _try_to_recover(self) -> None:
        if self._recover is not None:
            self._recover()

    def _parse(self, kind: type[R], data: Any) -> R:
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            raise self._strange(f"an answer is not a {kind.__name__} as this version knows it") from error

    def _error(self, answer: httpx.Response) -> FlashError:
        try:
            found = errors.from_wire(answer.json()["error"])
            pause = answer.headers.get("Retry-After", "")
            if pause.isdigit():
                found.retry_after_s = float(pause)
            return found
        except (ValueError, KeyError, TypeError, AttributeError):
            asked = f"{answer.request.method} {answer.request.url.path}"
            what = f"{self.base_url} answered {answer.status_code} to {asked}"
            kind = Unavailable if answer.status_code in RETRIED_STATUSES else InternalError
            return kind(what, detail=answer.text[:2000])

    def _strange(self, what: str) -> FlashError:
        return InternalError(f"{self.base_url}: {what}", remedy="another version? compare: flash server status")

    def _unreachable(self, error: Exception) -> Unavailable:
        if isinstance(error, Unavailable):
            return error
        return Unavailable(
            f"can't reach the server at {self.base_url}: {error or type(error).__name__}", remedy=self._remedy
        )


def ends_run(event: Event) -> bool:
    """Whether this event is the run's entry into a terminal state, its last one."""
    return event.kind is EventKind.STATE and event.data.get("to") in TERMINAL


def _step(step: int | None) -> dict[str, int] | None:
    return None if step is None else {"step": step}


def _part(text: str) -> str:
    """One segment of a path, so that no id can reach another route."""
    if not text or "/" in text or text in (".", "..") or not text.isprintable() or "?" in text or "#" in text:
        raise errors.InvalidInput(f"{text!r} is not an id")
    return text
