"""Runs: submit, list, look, cancel, events, checkpoints, adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from sqlalchemy import Connection

from flash.artifacts.manifests import adapter_only, stream_file
from flash.control_plane.auth import Me, Plane
from flash.control_plane.deploying import live_ref
from flash.control_plane.retrying import retry as retry_run
from flash.control_plane.services import Services
from flash.control_plane.status import files_removed, run_status, run_summary
from flash.control_plane.submitting import submit
from flash.errors import Conflict, InvalidInput, NotFound
from flash.failpoints import failpoint
from flash.records import (
    Checkpoint,
    Event,
    EventKind,
    KeepRequest,
    Manifest,
    PriorityRequest,
    RetryRequest,
    RunState,
    RunStatus,
    RunSummary,
    SubmitRequest,
)
from flash.storage import events, retention, runs
from flash.storage.identity import Caller

router = APIRouter(prefix="/api/runs", tags=["runs"])

Step = Annotated[int | None, Query(ge=0, lt=2**53)]
After = Annotated[int, Query(ge=0, lt=2**53)]
Key = Annotated[str | None, Header(min_length=1, max_length=200)]


class RunList(BaseModel):
    runs: list[RunSummary]


class EventPage(BaseModel):
    events: list[Event]
    last_seq: int


class CheckpointList(BaseModel):
    checkpoints: list[Checkpoint]


def _status(plane: Services, connection: Connection, run: runs.RunRow) -> RunStatus:
    waiting = 0
    if run.state is RunState.QUEUED:
        waiting = runs.count_ahead(connection, run)
    return run_status(
        run,
        runs.attempts_of(connection, [run.id])[run.id],
        runs.checkpoints_of(connection, run.id),
        now=plane.clock(),
        ahead=waiting,
        settings=plane.settings,
        store_url=plane.store.url,
        deployment=live_ref(connection, run.id),
    )


@router.post("", status_code=201, responses={200: {"model": RunStatus, "description": "a repeat: the same run"}})
def create(
    body: SubmitRequest,
    request: Request,
    response: Response,
    me: Me,
    plane: Plane,
    idempotency_key: Key = None,
) -> RunStatus:
    done = submit(plane, me, body, idempotency_key)
    failpoint("server.submitted")
    request.state.object = f"run={done.run_id}"
    if not done.created:
        response.status_code = 200
    with plane.database.read() as connection:
        return _status(plane, connection, runs.get_run(connection, done.run_id, org=me.org))


@router.get("")
def index(
    me: Me, plane: Plane, limit: Annotated[int, Query(ge=1, le=1000)] = 50, before: str | None = None
) -> RunList:
    with plane.database.read() as connection:
        found = runs.list_runs(connection, org=me.org, limit=limit, before=before)
    return RunList(runs=[run_summary(run) for run in found])


@router.get("/{run_id}")
def show(run_id: str, me: Me, plane: Plane) -> RunStatus:
    with plane.database.read() as connection:
        return _status(plane, connection, runs.get_run(connection, run_id, org=me.org))


@router.post("/{run_id}/cancel")
def cancel(run_id: str, me: Me, plane: Plane) -> RunStatus:
    with plane.database.write() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        runs.request_cancel(connection, run.id, now=plane.clock())
        status = _status(plane, connection, runs.get_run(connection, run_id, org=me.org))
    plane.wake.set()
    return status


@router.post(
    "/{run_id}/retry", status_code=201, responses={200: {"model": RunStatus, "description": "a repeat: the same run"}}
)
def retry(
    run_id: str,
    body: RetryRequest,
    request: Request,
    response: Response,
    me: Me,
    plane: Plane,
    idempotency_key: Key = None,
) -> RunStatus:
    """A new run from the exact state of a failed or cancelled one."""
    done = retry_run(plane, me, run_id, body.secrets, idempotency_key)
    request.state.object = f"run={done.run_id} retry_of={run_id}"
    if not done.created:
        response.status_code = 200
    with plane.database.read() as connection:
        return _status(plane, connection, runs.get_run(connection, done.run_id, org=me.org))


@router.post("/{run_id}/keep")
def keep(run_id: str, body: KeepRequest, me: Me, plane: Plane) -> RunStatus:
    """How long the run's files are kept after its end."""
    with plane.database.write() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        if run.collected_at is not None:
            raise Conflict(
                f"there is nothing left of {run.id} to keep: {files_removed(run)}",
                remedy="submit its config again for another run",
            )
        ttl_s = None if body.days is None else body.days * retention.DAY_S
        retention.keep(connection, run.id, pinned=body.pinned, ttl_s=ttl_s)
        return _status(plane, connection, runs.get_run(connection, run.id))


@router.post("/{run_id}/priority")
def set_priority(run_id: str, body: PriorityRequest, request: Request, me: Me, plane: Plane) -> RunStatus:
    """Among its org's own runs; it takes nothing from one that has a device."""
    request.state.object = f"run_id={run_id} priority={body.priority.value}"
    with plane.database.write() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        if run.state.terminal:
            raise Conflict(f"{run.id} is {run.state.value}: it waits for nothing any more")
        reason = f"its priority is {body.priority.value} now"
        runs.set_priority(connection, run.id, body.priority.rank, reason=reason, now=plane.clock())
        status = _status(plane, connection, runs.get_run(connection, run.id))
    plane.wake.set()
    return status


@router.get("/{run_id}/events")
def history(
    run_id: str,
    me: Me,
    plane: Plane,
    after: After = 0,
    kinds: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> EventPage:
    wanted = _kinds(kinds)
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        found = events.read(connection, run.id, after=after, kinds=wanted, limit=limit)
    return EventPage(events=found, last_seq=run.last_seq)


def _kinds(text: str | None) -> list[str] | None:
    if not text:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {kind.value for kind in EventKind}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidInput(f"kinds = {text!r}: {unknown[0]!r} is none", remedy=f"known are {', '.join(sorted(known))}")
    return names


def _visible(run_id: str, me: Me, plane: Plane) -> str:
    """The id, checked before a stream has begun: after that there is no status to answer with."""
    with plane.database.read() as connection:
        return runs.get_run(connection, run_id, org=me.org).id


@router.get("/{run_id}/events/stream", response_class=EventSourceResponse)
async def stream(
    run_id: Annotated[str, Depends(_visible)],
    plane: Plane,
    after: After = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[ServerSentEvent]:
    if last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
        after = min(int(last_event_id[:16]), 2**53)
    with plane.followers.follow(run_id) as changed:
        while not plane.followers.closed:
            changed.clear()
            lines, last = await plane.tails.after(run_id, after)
            for seq, text in lines:
                after = seq
                yield ServerSentEvent(raw_data=text, id=str(seq))
            if last:
                return
            if not lines:
                with suppress(TimeoutError):  # a fallback, for changes that another server committed
                    await asyncio.wait_for(changed.wait(), plane.settings.stream_poll_s)


@router.get("/{run_id}/checkpoints")
def checkpoints(run_id: str, me: Me, plane: Plane) -> CheckpointList:
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        return CheckpointList(checkpoints=runs.checkpoints_of(connection, run.id))


def _adapter(plane: Services, me: Caller, run_id: str, step: int | None) -> Manifest:
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        if step is None:
            known = runs.checkpoints_of(connection, run.id)
            final = [found.step for found in known if found.final]
            if not final:
                steps = ", ".join(str(found.step) for found in known) or "none"
                raise NotFound(
                    f"{run.id} has no final adapter",
                    remedy=f'name a step, as "{run.id}/step-N" (steps: {steps})',
                )
            step = final[-1]
        return adapter_only(runs.manifest_of(connection, run.id, step))


@router.get("/{run_id}/adapter")
def adapter(run_id: str, me: Me, plane: Plane, step: Step = None) -> Manifest:
    return _adapter(plane, me, run_id, step)


@router.get("/{run_id}/adapter/files/{path:path}", response_class=Response)
def adapter_file(run_id: str, path: str, me: Me, plane: Plane, step: Step = None) -> Response:
    manifest = _adapter(plane, me, run_id, step)
    found = next((file for file in manifest.files if file.path in (path, f"adapter/{path}")), None)
    if found is None:
        raise NotFound(f"the adapter has no file {path!r:.200}")
    chunks: Iterator[bytes] = stream_file(plane.store, manifest, found)
    headers = {"Content-Length": str(found.size), "ETag": f'"{found.sha256}"'}
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)
