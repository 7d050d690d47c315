"""A request's way to an engine: want one, wait until it is ready, ask it.

Owns the waiting and the HTTP to an engine's host. Knows nothing of names and adapters, of which it only carries
the headers, nor of what an answer means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
from starlette.concurrency import run_in_threadpool

from flash.control_plane.engines import TOKEN
from flash.control_plane.services import Services
from flash.errors import Unavailable, from_wire
from flash.records import EngineState, EngineView
from flash.storage import engines

_CONNECT_S = 10.0
_SAY_AGAIN_S = 2.0  # between two signs that someone waits for a queued engine
_LOOK_AGAIN_S = 1.0  # a wait is ended by the engine's change; this is for changes that another server committed


@dataclass(frozen=True)
class Host:
    """A ready engine's address."""

    engine_id: str
    url: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class NotReady:
    engine: EngineView
    reason: str


def new_client() -> httpx.AsyncClient:
    """For engines' hosts: they are ours, so no proxy stands between; how many may be asked at once is theirs to say."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(limits=limits, trust_env=False)


async def find_host(
    plane: Services, model: str, *, wait_s: float, avoid: Collection[str] = ()
) -> Host | NotReady:
    """The base's engine once it is ready, started if need be; `NotReady` with the reason after `wait_s`.

    `avoid` names engines that turned out not to answer. Raises what the engine's host said when it can't load
    the base.
    """
    deadline = time.monotonic() + wait_s
    while True:
        row, token = await run_in_threadpool(want, plane, model)
        if row.state is EngineState.READY and row.id not in avoid and row.url and token:
            return Host(row.id, row.url.rstrip("/"), token)
        with plane.followers.follow(row.id) as changed:
            before, row = row.state, await run_in_threadpool(_look, plane, row.id)
            if row.state is before and row.state in engines.USABLE:
                left = deadline - time.monotonic()
                if left <= 0:
                    return NotReady(row.view, wait_words(row))
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), min(left, _LOOK_AGAIN_S))
                row = await run_in_threadpool(_look, plane, row.id)
        if row.error is not None and row.ready_at is None and row.state not in engines.USABLE:
            raise from_wire(row.error)
        if plane.followers.closed:
            raise Unavailable("the server is stopping", remedy="try again in a moment")


def want(plane: Services, model: str) -> tuple[engines.EngineRow, str | None]:
    """The base's engine, put into the queue if there is none, and its token once it has one."""
    now = plane.clock()
    with plane.database.read() as connection:
        row = engines.usable(connection, model)
    if row is None or (row.state is EngineState.WAITING and now - (row.heartbeat_at or 0.0) >= _SAY_AGAIN_S):
        work_root = str(plane.settings.home / "work" / "engines")
        with plane.database.write() as connection:
            row = engines.want(connection, model, work_root=work_root, now=now)
        plane.wake.set()
    return row, None if row.sealed_token is None else plane.vault.unseal(row.id, TOKEN, row.sealed_token)


def wait_words(row: engines.EngineRow) -> str:
    """What an engine that is not ready waits for."""
    if row.state is EngineState.WAITING:
        return row.reason or "waiting for a free device"
    if row.state is EngineState.READY:
        return f"the engine of {row.model} on {row.device} was lost"
    doing = "starting an engine for" if row.state is EngineState.LAUNCHING else "loading"
    return f"{doing} {row.model} on {row.device}"


def _look(plane: Services, engine_id: str) -> engines.EngineRow:
    with plane.database.read() as connection:
        return engines.get(connection, engine_id)


async def ask(
    client: httpx.AsyncClient, host: Host, path: str, body: bytes, headers: Mapping[str, str], *, silence_s: float
) -> httpx.Response:
    """The host's answer as soon as it begins; the caller closes it. Raises httpx's TransportError."""
    request = client.build_request(
        "POST",
        f"{host.url}{path}",
        content=body,
        headers={**headers, "Authorization": f"Bearer {host.token}", "Content-Type": "application/json"},
        timeout=httpx.Timeout(silence_s, connect=_CONNECT_S, pool=None),
    )
    return await client.send(request, stream=True)
