"""What came in and what became of it: request ids, counts, the access log, the audit log.

Owns the middleware that sees every request once. It decides nothing and reads no body. What is audited: every change
asked for under `/api`, done or not, and every refusal anywhere; of refusals from one address only so many a minute
are written down one by one, and the rest as a count, so that no one can fill the disk by being refused.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flash.control_plane.counting import Refusals
from flash.control_plane.services import Services
from flash.storage import audit
from flash.storage.identity import Caller

log = logging.getLogger("flash.requests")

REQUEST_ID = "x-request-id"
REFUSED = frozenset({401, 402, 403, 404, 429})
_SAID = REFUSED | {409}  # refusals whose words are kept; others may quote what was sent
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOKING = ("GET", "HEAD", "OPTIONS")
_SIGNIFICANT = re.compile(r"/api/|/worker/|/v1/|/metrics$")


class Watch:
    """ASGI middleware, the outermost of ours."""

    def __init__(self, app: ASGIApp, *, plane: Services) -> None:
        self._app = app
        self._plane = plane
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        given = dict(scope["headers"]).get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        began = time.monotonic()
        status = 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), request_id.encode())]
                entry = self._entry(scope, status)
                if entry is not None:  # before the answer: what was answered is on record
                    await run_in_threadpool(self._record, entry)
            await send(message)

        try:
            await self._app(scope, receive, told)
        except Exception:  # a defect, answered further out: it counts all the same
            status = status or 500
            entry = self._entry(scope, status)
            if entry is not None:
                await run_in_threadpool(self._record, entry)
            raise
        finally:
            self._count(scope, status, time.monotonic() - began, request_id)

    def _entry(self, scope: Scope, status: int) -> audit.Entry | None:
        """What the audit log is to keep of this request, if anything."""
        path, method = scope["path"], scope["method"]
        changes = method not in _LOOKING and path.startswith("/api/")
        refused = status in REFUSED and _SIGNIFICANT.match(path) is not None
        caller: Caller | None = scope["state"].get("caller")
        if status == 404 and caller is None:
            refused = False  # nobody asked for nothing
        if not (changes or refused):
            return None
        message = scope["state"].get("problem") if status in _SAID else None
        address = scope["client"][0] if scope.get("client") else None
        if status >= 400:
            unsaid = self._refusals.admit(address or "", time.monotonic())
            if unsaid is None:
                return None
            if unsaid:
                message = f"{message or 'refused'} (and {unsaid} more refusals from there before)"
        return audit.Entry(
            action=f"{method} {route_of(scope) or path}",
            status=status,
            org=caller.org if caller else None,
            actor=caller.key_id if caller and caller.key_id else audit.ANONYMOUS,
            name=caller.name if caller else None,
            address=address,
            object=scope["state"].get("object") or _object(scope),
            message=message,
        )

    def _record(self, entry: audit.Entry) -> None:
        try:
            with self._plane.database.write() as connection:
                audit.record(connection, entry, now=self._plane.clock())
        except SQLAlchemyError as error:  # the request itself was decided; its record must not undo that
            log.error("not on record: %s %s by %s: %s", entry.action, entry.status, entry.actor, error)

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = route_of(scope)
        self._plane.requests.count(scope["method"], route or "none", status, seconds)
        if self._plane.settings.access_log:
            caller: Caller | None = scope["state"].get("caller")
            log.info(
                "%s %s %d in %.0f ms", scope["method"], scope["path"], status, seconds * 1000,
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "path": scope["path"],
                    "status": status,
                    "ms": round(seconds * 1000, 1),
                    "address": scope["client"][0] if scope.get("client") else None,
                    "org": caller.org if caller else None,
                    "key": caller.key_id if caller else None,
                },
            )  # fmt: skip


def route_of(scope: Scope) -> str | None:
    """The route's own path, with its parameters' names; None where nothing answered."""
    return getattr(scope.get("route"), "path", None)


def _object(scope: Scope) -> str | None:
    parameters: dict[str, Any] = scope.get("path_params") or {}
    return " ".join(f"{name}={value}" for name, value in parameters.items()) or None
