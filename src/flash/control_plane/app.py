"""The HTTP application: routes, errors in one shape, body limits, the reconciler's life.

Owns no rule about runs; those live in `submitting`, `reconciler` and `storage`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flash import __version__
from flash.control_plane.calling import new_client
from flash.control_plane.reconciler import Reconciler
from flash.control_plane.routes import (
    admin,
    dashboard,
    deployments,
    environments,
    metrics,
    openai,
    runs,
    server,
    worker,
)
from flash.control_plane.routes.openai import openai_answer, speaks_openai
from flash.control_plane.services import Services, open_services
from flash.control_plane.settings import ServerSettings
from flash.control_plane.watching import Watch
from flash.errors import ConfigError, FlashError, InternalError, InvalidInput, NotFound, Unavailable
from flash.serving.openai import as_api_error, error_body, validation_error

log = logging.getLogger("flash.server")


class ErrorBody(BaseModel):
    code: str
    message: str
    remedy: str | None = None
    detail: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": words}
    for status, words in {
        400: "the body can't be read as JSON",
        401: "no key, or one that is not valid here",
        402: "what the key may cost is spent, or would be",
        403: "the key is good, but not for this",
        404: "no such object",
        409: "the object moved on",
        413: "the body is too large",
        422: "the request can't be carried out as it stands",
        429: "the key has as much under way as it may, or too many requests are waiting",
        503: "a part of the service can't be reached now",
    }.items()
}


def create_app(
    settings: ServerSettings, *, services: Services | None = None, reconcile: bool = True
) -> FastAPI:
    """The application over `settings.home`. Given `services` stay the caller's to close.

    Without `reconcile` nothing happens to a run unless the caller ticks a `Reconciler` of its own.
    """
    plane = services or open_services(settings)
    reconciler = Reconciler(plane)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if reconcile:
            reconciler.start()
        async with new_client() as app.state.hosts:
            yield
        plane.followers.close()
        if reconcile:
            reconciler.stop()
        if services is None:
            plane.close()

    app = FastAPI(title="Flash", version=__version__, lifespan=lifespan, responses=ERRORS)
    app.state.services = plane
    for routes in (server, runs, environments, deployments, openai, metrics, worker, dashboard, admin):
        app.include_router(routes.router)
    app.include_router(worker.engine_router)
    app.include_router(worker.launch_router)
    app.add_exception_handler(FlashError, _flash_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    for trouble in (OperationalError, InterfaceError, TimeoutError):  # the last: no connection was free
        app.add_exception_handler(trouble, _database_error)
    app.add_exception_handler(Exception, _defect)
    app.add_middleware(BodyLimit, limit=settings.max_body, archive_limit=settings.max_archive)
    app.add_middleware(Watch, plane=plane)
    return app


def _answer(request: Request, error: FlashError, status: int | None = None) -> Response:
    request.state.problem = error.message
    if speaks_openai(request.url.path):
        return openai_answer(error, status=status)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    # Escaped to ASCII: a message may quote text from the request that UTF-8 can't carry.
    body = json.dumps({"error": error.to_wire()})
    return Response(body, status or error.status, headers=headers, media_type="application/json")


async def _flash_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FlashError)
    if error.status >= 500:
        log.error("%s: %s", type(error).__name__, error)
    return _answer(request, error)


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if speaks_openai(request.url.path):
        return openai_answer(validation_error(found))
    if any(item["type"] == "json_invalid" for item in found):
        return _answer(request, InvalidInput("the body is not valid JSON"), 400)
    # Values are left out: a body may hold secrets.
    problems = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in found[:20]]
    return _answer(request, ConfigError(problems), 422)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _answer(request, NotFound(f"nothing is at {request.url.path!r:.200}"))
    if error.status_code == 400:
        return _answer(request, InvalidInput("the body can't be read"), 400)
    answer = _answer(request, InvalidInput(str(error.detail)), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _database_error(request: Request, error: Exception) -> Response:
    log.error("the database failed: %s", error)
    problem = Unavailable("the database can't be used now", remedy="see the server's log; try again")
    return _answer(request, problem)


async def _defect(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(request, InternalError("a defect in Flash's server", remedy="see the server's log"))


class BodyLimit:
    """Refuses bodies over the limit with 413, by their declared length or as soon as they exceed it."""

    def __init__(self, app: ASGIApp, *, limit: int, archive_limit: int) -> None:
        self._app = app
        self._limit = limit
        self._archive_limit = archive_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        archives = scope["path"].startswith("/api/environments/")
        limit = self._archive_limit if archives else self._limit
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await _refuse(send, limit, scope["path"])
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _too_large(limit))
            return message

        await self._app(scope, counted, send)


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit:,} bytes"


async def _refuse(send: Send, limit: int, path: str) -> None:
    error = InvalidInput(_too_large(limit), remedy="send less at once")
    told = error_body(as_api_error(error)) if speaks_openai(path) else {"error": error.to_wire()}
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
