"""The HTTP side of an engine host: OpenAI's two endpoints, health and metrics.

Owns a request's way from body to answer: who may ask, how many at once, the adapter, the exchange with the
engine, streams, what happens when a client leaves. Rendering and shapes are `answering`'s, tokens the engine's.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flash import __version__
from flash.errors import Busy, FlashError
from flash.inference.engine import ServingEngine
from flash.serving.adapters import Adapter, AdapterShelf
from flash.serving.answering import Answer, Served, Target, chat_answer, completion_answer
from flash.serving.exchange import Exchange, Mailbox, Traffic
from flash.serving.hello import ADAPTER_HEADER, MANIFEST_HEADER, MODEL_HEADER, SCOPE_HEADER, EngineHello
from flash.serving.metrics import CONTENT_TYPE, Counter, Histogram, exposition
from flash.serving.openai import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    as_api_error,
    error_body,
    error_headers,
    validation_error,
)

log = logging.getLogger("flash.serving")
MAX_BODY = 32 << 20  # bytes: the longest contexts as token ids
T = TypeVar("T")

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "the request can't be served as it stands",
        401: "not the engine's token",
        404: "no such adapter",
        408: "the request or its answer took too long to pass",
        413: "the body is too large",
        422: "the adapter does not fit this base",
        429: "the queue is full; Retry-After says when to come back",
        503: "the engine is leaving, or the store can't be reached",
    }.items()
}


class Room:
    """Everything that requests meet in this process. Made inside the event loop that serves them."""

    def __init__(self, hello: EngineHello, served: Served, engine: ServingEngine, shelf: AdapterShelf) -> None:
        self.hello = hello
        self.served = served
        self.engine = engine
        self.shelf = shelf
        self.traffic = Traffic()
        self.mailbox = Mailbox(asyncio.get_running_loop())
        self.draining = False
        self.requests = Counter("flash_engine_requests_total", "Requests by endpoint and status.")
        self.tokens = Counter("flash_engine_answer_tokens_total", "Tokens of answered requests by kind.")
        self.cancelled = Counter("flash_engine_cancelled_total", "Requests that ended before their answer did.")
        self.first_token = Histogram("flash_engine_first_token_seconds", "From a request's arrival to its first news.")
        self.duration = Histogram("flash_engine_request_seconds", "From a request's arrival to its end.")

    def open(self) -> Exchange:
        """Raises Busy or ApiError (draining) before anything is done for the request."""
        if self.draining:
            raise ApiError(
                "this engine is leaving", status=503, type="server_error", code="engine_leaving", retry_after_s=1.0
            )
        most = self.hello.max_rows + self.hello.max_waiting
        if self.traffic.in_flight >= most:
            raise Busy(f"{most} requests are in flight already")
        return Exchange(self.traffic, self.mailbox, unread_tokens=self.hello.unread_tokens)

    def stats(self) -> dict[str, float]:
        return {
            **self.engine.stats(),
            "in_flight": self.traffic.in_flight,
            "adapters_loaded": self.shelf.count,
            "adapter_loads_total": self.shelf.loads_total,
            "adapter_evictions_total": self.shelf.evictions_total,
        }

    def page(self) -> str:
        values = {f"flash_engine_{name}": value for name, value in self.stats().items()}
        return exposition([self.requests, self.tokens, self.cancelled, self.first_token, self.duration], values)


def create_app(room: Room) -> FastAPI:
    app = FastAPI(title="Flash engine", version=__version__, docs_url=None, redoc_url=None)
    app.state.room = room
    app.include_router(router, dependencies=[Depends(_authorised)], responses=_ERRORS)
    for kind in (FlashError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(_BodyLimit)
    return app


async def _authorised(request: Request, authorization: Annotated[str | None, Header()] = None) -> None:
    room: Room = request.app.state.room
    given = (authorization or "").removeprefix("Bearer ").encode()
    if not hmac.compare_digest(given, room.hello.token.encode()):
        raise ApiError("not the engine's token", status=401, type="authentication_error", code="invalid_api_key")


async def _answer_error(request: Request, error: Exception) -> Response:
    failed = _named(error, request)
    room: Room = request.app.state.room
    endpoint = request.url.path if request.url.path.startswith("/v1/") and failed.status != 404 else "other"
    room.requests.add(endpoint=endpoint, status=str(failed.status))
    # Escaped to ASCII: a message may quote what UTF-8 can't carry.
    return Response(
        json.dumps(error_body(failed)), failed.status, headers=error_headers(failed), media_type="application/json"
    )


def _named(error: Exception, request: Request | None = None) -> ApiError:
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors())
    if isinstance(error, HTTPException):
        where = request.url.path if request else ""
        words = f"nothing is at {where!r:.200}" if error.status_code == 404 else str(error.detail)
        return ApiError(words, status=error.status_code)
    failed = as_api_error(error)
    if failed.status >= 500:
        log.error("a request failed: %s", error, exc_info=None if isinstance(error, FlashError) else error)
    return failed


class _BodyLimit:
    """Refuses bodies over the limit as soon as they exceed it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY:,} bytes")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


# --- routes -----------------------------------------------------------------------------------------------

router = APIRouter()


class Asked:
    """What the control plane says about a request, in headers."""

    def __init__(
        self,
        model: Annotated[str | None, Header(alias=MODEL_HEADER)] = None,
        adapter: Annotated[str | None, Header(alias=ADAPTER_HEADER)] = None,
        manifest: Annotated[str | None, Header(alias=MANIFEST_HEADER)] = None,
        scope: Annotated[str | None, Header(alias=SCOPE_HEADER)] = None,
    ) -> None:
        self.model = unquote(model) if model else None
        self.scope = scope or ""
        if bool(adapter) != bool(manifest):
            raise ApiError(f"{ADAPTER_HEADER} and {MANIFEST_HEADER} go together")
        self.adapter = Adapter(adapter, manifest) if adapter and manifest else None


_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's answer; with `stream` its chunks as server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


@router.post("/v1/chat/completions", responses=_ANSWER)
async def chat_completions(request: Request, body: ChatRequest, asked: Annotated[Asked, Depends()]) -> Response:
    return await _serve(request, body, asked, lambda served, target: chat_answer(served, body, target))


@router.post("/v1/completions", responses=_ANSWER)
async def completions(request: Request, body: CompletionRequest, asked: Annotated[Asked, Depends()]) -> Response:
    return await _serve(request, body, asked, lambda served, target: completion_answer(served, body, target))


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    room: Room = request.app.state.room
    return {"status": "leaving" if room.draining else "ready", "model": room.served.model, "version": __version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    room: Room = request.app.state.room
    return Response(room.page(), media_type=CONTENT_TYPE)


# --- one request ------------------------------------------------------------------------------------------


async def _serve(
    request: Request,
    body: ChatRequest | CompletionRequest,
    asked: Asked,
    prepare: Callable[[Served, Target], Answer],
) -> Response:
    room: Room = request.app.state.room
    exchange = room.open()
    try:
        answer, news = await _while_connected(request, _begin(room, exchange, asked, body.model, prepare))
        if body.stream:
            return _Stream(room, exchange, answer, news, usage_wanted=body.usage_wanted, endpoint=request.url.path)
        whole = await _while_connected(request, _finish(exchange, answer, news))
    except _ClientGone:
        room.cancelled.add(reason="disconnect")
        exchange.close()
        return Response(status_code=499)  # no one reads it
    except BaseException:
        exchange.close()
        raise
    exchange.close()
    _count(room, exchange, answer, request.url.path)
    return JSONResponse(whole)


async def _begin(
    room: Room, exchange: Exchange, asked: Asked, model: str, prepare: Callable[[Served, Target], Answer]
) -> tuple[Answer, list[Any]]:
    """Up to the engine's first word; what can't be served fails here, before an answer has begun."""
    thinking = False
    if asked.adapter is not None:
        exchange.held = await room.shelf.hold(asked.adapter)
        thinking = exchange.held.thinking
    digest = asked.adapter.digest if asked.adapter else None
    target = Target(asked.model or model, digest, asked.scope, thinking)
    answer = await asyncio.to_thread(prepare, room.served, target)
    most = room.hello.max_rows + room.hello.max_waiting
    if len(answer.requests) > most:
        raise ApiError(f"prompt: {len(answer.requests)} prompts at once, but at most {most} are taken", param="prompt")
    exchange.submit(room.engine, answer.requests)
    news = await exchange.next()
    room.first_token.observe(time.monotonic() - exchange.began)
    return answer, [delta for number, item in news for delta in answer.take(number, item)]


async def _finish(exchange: Exchange, answer: Answer, begun: list[Any]) -> dict[str, Any]:
    answer.keep(begun)
    while not answer.finished:
        for number, item in await exchange.next():
            answer.keep(answer.take(number, item))
    return answer.body()


def _count(room: Room, exchange: Exchange, answer: Answer, endpoint: str) -> None:
    room.requests.add(endpoint=endpoint, status="200")
    room.tokens.add(answer.prompt_tokens, kind="prompt")
    room.tokens.add(answer.completion_tokens, kind="completion")
    room.duration.observe(time.monotonic() - exchange.began)


class _ClientGone(Exception):
    """No one waits for the answer any more."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The work's result; it is cancelled, and _ClientGone raised, when the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Stream(Response):
    """The answer as server-sent events. Whatever ends it closes the exchange.

    News that came while the reader was busy goes out as one chunk a choice. A reader that takes nothing at all
    for `stalled_s` is dropped.
    """

    def __init__(
        self,
        room: Room,
        exchange: Exchange,
        answer: Answer,
        begun: list[Any],
        *,
        usage_wanted: bool,
        endpoint: str,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._room = room
        self._exchange = exchange
        self._answer = answer
        self._begun = begun
        self._usage_wanted = usage_wanted
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                self._room.cancelled.add(reason="disconnect")
        finally:
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            self._exchange.close()

    async def _write(self, send: Send) -> None:
        patience = self._room.hello.stalled_s
        try:
            async with asyncio.timeout(patience):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events():
                async with asyncio.timeout(patience):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            async with asyncio.timeout(patience):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            self._room.cancelled.add(reason="stalled")

    async def _events(self) -> AsyncIterator[bytes]:
        answer, wanted = self._answer, self._usage_wanted
        try:
            for delta in self._begun:
                yield _event(answer.chunk(delta, usage_wanted=wanted))
            while not answer.finished:
                for delta in answer.joined(await self._exchange.next()):
                    yield _event(answer.chunk(delta, usage_wanted=wanted))
            if wanted:
                yield _event(answer.usage_chunk())
            yield b"data: [DONE]\n\n"
            _count(self._room, self._exchange, answer, self._endpoint)
        except Exception as error:
            failed = _named(error)
            self._room.requests.add(endpoint=self._endpoint, status=str(failed.status))
            yield _event(error_body(failed))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
