"""OpenAI's API: names looked up here, requests passed on to an engine's host, answers passed back as they come.

Owns who may ask, which adapter a name means, the checkpoint headers, and what happens when an engine is not
there, is lost, or the caller leaves. What a request says beyond its `model`, and every answer, is the host's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack
from typing import Annotated, Any, TypeVar

import httpx
from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from flash.control_plane import deploying
from flash.control_plane.auth import Me, Plane
from flash.control_plane.calling import Host, NotReady, ask, find_host
from flash.control_plane.deploying import Target
from flash.control_plane.services import Services
from flash.errors import Conflict, FlashError, NotFound, Unavailable
from flash.serving.openai import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    as_api_error,
    error_body,
    error_headers,
)

CHECKPOINT = "X-Freesolo-Checkpoint"
EXPECTED = "X-Freesolo-Expected-Checkpoint"
_PASSED_BACK = ("content-type", "retry-after")
_RETRY_AFTER_S = 5.0  # what a caller is told whose engine was not ready in time
LEAVING = "engine_leaving"  # the code of a host that takes no more requests
_GONE = 499  # nobody reads it: the caller has left

T = TypeVar("T")

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "the request can't be served as it stands",
        401: "no key, or one that is not valid here",
        404: "no such model",
        409: "another checkpoint is live than the expected one",
        413: "the body is too large",
        422: "the headers can't be read",
        429: "too many requests are waiting",
        503: "the engine is not there yet, or was lost: try again",
    }.items()
}
_HEADERS = {CHECKPOINT: {"description": "the step that answered; absent for a bare base", "schema": {"type": "string"}}}
router = APIRouter(prefix="/v1", tags=["openai"], responses=_ERRORS)

Expected = Annotated[str | None, Header(alias=EXPECTED, max_length=200)]


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str
    checkpoint: str | None = None  # of a deployed run: the step that is live, as RUN_ID/step-N
    base: str | None = None


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


@router.get("/models")
def models(me: Me, plane: Plane) -> ModelList:
    """The org's deployments by run id, and the bases that this server can serve."""
    return ModelList(data=_models(plane, me.org))


@router.get("/models/{name:path}")
def model(name: str, me: Me, plane: Plane) -> Model:
    found = _target(plane, me.org, name)
    if found.revision is None:
        return next((each for each in _models(plane, me.org) if each.id == name), _bare(found.model))
    live = deploying.get_deployment(plane, me.org, found.revision.run_id)
    return Model(
        id=name, created=int(live.deployed_at), owned_by=me.org, checkpoint=found.revision.ref, base=found.model
    )


def _models(plane: Services, org: str) -> list[Model]:
    live = [
        Model(id=each.run_id, created=int(each.deployed_at), owned_by=org, checkpoint=each.ref, base=each.model)
        for each in deploying.list_deployments(plane, org)
    ]
    return [*live, *(_bare(entry.id) for entry in deploying.servable(plane))]


def _bare(name: str) -> Model:
    return Model(id=name, created=0, owned_by="flash")


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "OpenAI's form; server-sent events if `stream`", "headers": _HEADERS}
}


@router.post("/chat/completions", responses=_ANSWERS, response_class=Response)
async def chat_completions(
    body: ChatRequest, request: Request, me: Me, plane: Plane, expected: Expected = None
) -> Response:
    return await _answer(request, plane, me.org, body.model, expected)


@router.post("/completions", responses=_ANSWERS, response_class=Response)
async def completions(
    body: CompletionRequest, request: Request, me: Me, plane: Plane, expected: Expected = None
) -> Response:
    return await _answer(request, plane, me.org, body.model, expected)


# --- one request ------------------------------------------------------------------------------------------


async def _answer(request: Request, plane: Services, org: str, name: str, expected: str | None) -> Response:
    """The host's answer, and its count for `/metrics`: a stream is counted when it ends."""
    began, path = time.monotonic(), request.url.path

    def count(status: int) -> None:
        plane.traffic.record(org, path, status, time.monotonic() - began)

    try:
        answer = await _serve(request, plane, org, name, expected)
    except Exception as error:
        count(as_api_error(error).status)
        raise
    if isinstance(answer, Relay):
        answer.when_done(count)
    else:
        count(answer.status_code)
    return answer


async def _serve(request: Request, plane: Services, org: str, name: str, expected: str | None) -> Response:
    with ExitStack() as held:
        held.enter_context(plane.traffic.admitted())
        target = await run_in_threadpool(_target, plane, org, name)
        _check_pin(target, expected)
        asked = await _unless_gone(request, _ask(request, plane, target, await request.body()))
        if asked is None:
            return Response(status_code=_GONE)
        upstream, using = asked
        held.push(using)
        headers = {name: upstream.headers[name] for name in _PASSED_BACK if name in upstream.headers}
        if target.revision is not None:
            headers[CHECKPOINT] = target.revision.ref
        if headers.get("content-type", "").startswith("text/event-stream"):
            return Relay(upstream, {**headers, "cache-control": "no-cache"}, plane, held.pop_all())
        whole = await _unless_gone(request, _read(upstream, plane))
        if whole is None:
            return Response(status_code=_GONE)
        return Response(whole, upstream.status_code, headers=headers)


def _target(plane: Services, org: str, name: str) -> Target:
    try:
        return deploying.find_target(plane, org, name)
    except NotFound as error:
        raise ApiError(str(error), status=404, param="model", code="model_not_found") from error


def _check_pin(target: Target, expected: str | None) -> None:
    """409 unless the step that would answer is the expected one: `RUN_ID/step-N`, `step-N` or `N`."""
    if expected is None:
        return
    if target.revision is None:
        raise Conflict(f"{EXPECTED}: {expected}, but {target.name} is a bare base", remedy="leave the header out")
    ref, step = target.revision.ref, target.revision.step
    if expected not in (ref, f"step-{step}", str(step)):
        raise Conflict(f"{EXPECTED}: {expected}, but {ref} is live", remedy="deploy that step, or expect this one")


async def _ask(
    request: Request, plane: Services, target: Target, body: bytes
) -> tuple[httpx.Response, ExitStack]:
    """The beginning of a host's answer. An engine that is lost before it began is asked for once more."""
    deadline = time.monotonic() + plane.settings.engine_wait_s
    lost: set[str] = set()
    while True:
        host = await _host(plane, target, deadline - time.monotonic(), lost)
        with ExitStack() as using:
            using.enter_context(plane.traffic.using(host.engine_id))
            try:
                answer = await ask(
                    request.app.state.hosts, host, request.url.path, body, target.headers,
                    silence_s=plane.settings.engine_silence_s,
                )  # fmt: skip
            except httpx.TimeoutException:
                silence = plane.settings.engine_silence_s
                raise _unavailable(f"the engine of {target.model} gave no answer for {silence:g} s") from None
            except httpx.TransportError as error:
                plane.wake.set()
                if lost:
                    raise _unavailable(f"the engine of {target.model} was lost ({type(error).__name__})") from error
                lost.add(host.engine_id)
                continue
            if answer.status_code == 503 and not lost and await _leaves(answer):
                lost.add(host.engine_id)
                continue
            return answer, using.pop_all()


async def _host(plane: Services, target: Target, wait_s: float, lost: set[str]) -> Host:
    try:
        found = await find_host(plane, target.model, wait_s=wait_s, avoid=lost)
    except FlashError as error:
        raise _unavailable(f"{target.model} can't be served now: {error}") from error
    if isinstance(found, NotReady):
        raise _unavailable(f"{target.model} is not ready yet: {found.reason}")
    return found


async def _leaves(answer: httpx.Response) -> bool:
    """Whether the engine refused because it is on its way out, so that another one will answer."""
    try:
        await answer.aread()
        leaving: bool = answer.json()["error"]["code"] == LEAVING
    except (httpx.TransportError, ValueError, KeyError, TypeError):
        return False
    return leaving


def _unavailable(message: str) -> ApiError:
    return ApiError(
        message, status=503, type="server_error", code=Unavailable.code, retry_after_s=_RETRY_AFTER_S
    )


async def _read(upstream: httpx.Response, plane: Services) -> bytes:
    try:
        return await upstream.aread()
    except httpx.TransportError as error:
        plane.wake.set()
        raise _unavailable(f"the engine was lost in the middle of the answer ({type(error).__name__})") from error
    finally:
        await upstream.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result, or None as soon as the caller has left; the work is cancelled then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Relay(StreamingResponse):
    """A host's event stream, passed on piece by piece; the host's side is closed whatever becomes of ours."""

    def __init__(self, upstream: httpx.Response, headers: dict[str, str], plane: Services, held: ExitStack) -> None:
        super().__init__(self._pieces(), status_code=upstream.status_code, headers=headers)
        self._upstream = upstream
        self._plane = plane
        self._held = held

    def when_done(self, count: Callable[[int], None]) -> None:
        self._held.callback(count, self.status_code)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._upstream.aclose()

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._upstream.aiter_raw():
                yield piece
        except httpx.TransportError as error:
            self._plane.wake.set()
            lost = _unavailable(f"the engine was lost in the middle of the answer ({type(error).__name__})")
            yield f"\n\ndata: {json.dumps(error_body(lost))}\n\n".encode()


# --- errors in OpenAI's form ------------------------------------------------------------------------------


def speaks_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def openai_answer(error: Exception, *, status: int | None = None) -> Response:
    told = as_api_error(error)
    body = json.dumps(error_body(told))
    return Response(body, status or told.status, headers=error_headers(told), media_type="application/json")
