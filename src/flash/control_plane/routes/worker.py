"""The worker API: claim, heartbeat, events, checkpoints, finish, the environment's archive; an engine's heartbeat;
addresses in the bucket for both; the exchange of a launch's ticket.

Every write is fenced: it names its attempt and epoch (or its engine), and one that is over gets 409.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from flash.artifacts.manifests import environment_key, manifest_key, object_digests, object_key
from flash.control_plane import checkpoints
from flash.control_plane.auth import EngineHost, Plane, Ticket, Worker, WorkerIdentity, require_live
from flash.control_plane.engines import hello as engine_hello
from flash.control_plane.engines import record_heartbeat
from flash.control_plane.reconciler import last_beat, progress_of
from flash.control_plane.redacting import redacted_events, redacted_finish, redacted_manifest, redactor_for
from flash.control_plane.services import Services
from flash.errors import Conflict, Forbidden, InvalidInput
from flash.failpoints import failpoint
from flash.launching.launcher import LaunchRequest
from flash.records import (
    AttemptState,
    CheckpointReport,
    Claim,
    EngineState,
    EventAck,
    EventBatch,
    FailureKind,
    Finish,
    Heartbeat,
    HeartbeatAnswer,
    SignAnswer,
    SignRequest,
)
from flash.serving.hello import AddressRequest, EngineAnswer, EngineHeartbeat
from flash.storage import engines, environments, identity, runs

router = APIRouter(prefix="/worker/attempts/{attempt_id}", tags=["worker"])
engine_router = APIRouter(prefix="/worker/engines/{engine_id}", tags=["worker"])
launch_router = APIRouter(prefix="/worker/launches/{worker_id}", tags=["worker"])

RUNNING = (AttemptState.RUNNING,)
SIGNED_S = 3600.0  # how long an address is good: for a large object on a thin line


class ClaimRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    pid: Annotated[int, Field(ge=1, lt=2**31)]
    device: Annotated[str | None, Field(max_length=64)] = None  # as the worker calls it; for its log alone


def _live(connection: Connection, worker: WorkerIdentity, epoch: int) -> runs.AttemptRow:
    attempt = runs.get_attempt(connection, worker.run_id, worker.epoch)
    require_live(attempt, epoch, states=RUNNING)
    return attempt


@router.post("/claim")
def claim(body: ClaimRequest, worker: Worker, plane: Plane) -> Claim:
    with plane.database.write(about=worker.run_id) as connection:
        attempt = runs.get_attempt(connection, worker.run_id, worker.epoch)
        require_live(attempt, worker.epoch, states=(AttemptState.LAUNCHING, AttemptState.RUNNING))
        if not runs.claim(connection, attempt, pid=body.pid, now=plane.clock()):
            raise Conflict(f"attempt {attempt.id} is taken or over", remedy="this worker must exit")
        attempt = runs.get_attempt(connection, worker.run_id, worker.epoch)
    _saw(plane, attempt)
    failpoint("server.claimed")
    resume = checkpoints.find_resume(plane, worker.run_id)
    with plane.database.read() as connection:
        run = runs.get_run(connection, worker.run_id)
        version = environments.pinned(
            connection,
            namespace=run.environment_namespace,
            name=run.environment_name,
            sha256=run.environment_sha256,
        )
        secrets = plane.vault.open_all(connection, run.id)
        init = checkpoints.find_init(connection, run)
    for name in ("beat", "progress"):  # finding a checkpoint may have taken a while
        plane.stopwatches.restart(attempt.id, name)
    plane.wake.set()
    return Claim(
        run_id=run.id,
        epoch=attempt.epoch,
        spec=run.spec,
        secrets=secrets,
        environment=version,
        store_url=plane.store.url,
        store_options={} if plane.signs_for_workers else plane.store.options,
        signed=plane.signs_for_workers,
        work_dir=attempt.work_dir,
        host_user=plane.settings.host_user,
        resume_from=resume,
        init_from=init,
        heartbeat_s=plane.settings.heartbeat_s,
        lease_s=plane.settings.lease_s,
        micro_batch_divisor=run.micro_batch_divisor,
    )


def _saw(plane: Services, attempt: runs.AttemptRow) -> None:
    """Its lease and its progress count from here."""
    plane.stopwatches.unchanged(last_beat(attempt), attempt.id, "beat")
    plane.stopwatches.unchanged(progress_of(attempt), attempt.id, "progress")


@router.post("/heartbeat")
def heartbeat(body: Heartbeat, worker: Worker, plane: Plane) -> HeartbeatAnswer:
    with plane.database.write(about=worker.run_id) as connection:
        attempt = _live(connection, worker, body.epoch)
        now = plane.clock()
        active_s = _under_lease(plane, attempt, now)
        beaten = runs.record_heartbeat(connection, attempt, body, active_s=active_s, now=now)
        run = runs.get_run(connection, attempt.run_id)
    _saw(plane, beaten)
    stop = attempt.stop_reason is not None or run.desired == "cancel"
    return HeartbeatAnswer(desired="cancel" if stop else "run", lease_s=plane.settings.lease_s)


def _under_lease(plane: Services, attempt: runs.AttemptRow, now: float) -> float:
    """Seconds to add to the run's time. With several servers only the database knows of the beat before."""
    since = last_beat(attempt)
    alone = plane.stopwatches.unchanged(since, attempt.id, "beat")
    silent_s = now - since if plane.database.shared and since is not None else alone
    return min(max(0.0, silent_s), plane.settings.lease_s)


@router.post("/events")
def events(body: EventBatch, worker: Worker, plane: Plane) -> EventAck:
    with plane.database.write(about=worker.run_id) as connection:
        attempt = _live(connection, worker, body.epoch)
        said = redacted_events(redactor_for(plane, connection, worker.run_id), body.events)
        watermark = runs.record_events(connection, attempt, said, now=plane.clock())
    failpoint("server.events")
    return EventAck(acknowledged=watermark)


@router.post("/checkpoints", status_code=204)
def report_checkpoint(body: CheckpointReport, worker: Worker, plane: Plane) -> None:
    with plane.database.read() as connection:
        _live(connection, worker, body.epoch)
    manifest = checkpoints.checked_manifest(plane, worker.run_id, body)
    with plane.database.write(about=worker.run_id) as connection:
        attempt = _live(connection, worker, body.epoch)
        runs.record_checkpoint(
            connection,
            redacted_manifest(redactor_for(plane, connection, worker.run_id), manifest),
            epoch=attempt.epoch,
            manifest_sha256=body.manifest_sha256,
            now=plane.clock(),
        )
    failpoint("server.checkpoint")
    plane.stopwatches.restart(worker.attempt_id, "progress")
    checkpoints.thin_out(plane, worker.run_id)


@router.post("/finish", status_code=204)
def finish(body: Finish, worker: Worker, plane: Plane) -> None:
    refused = None
    with plane.database.write(about=worker.run_id) as connection:
        attempt = runs.get_attempt(connection, worker.run_id, worker.epoch)
        if attempt.outcome == body.outcome and body.epoch == attempt.epoch:
            return  # said before; the answer was lost
        require_live(attempt, body.epoch, states=RUNNING)
        values = _last_word(redacted_finish(redactor_for(plane, connection, worker.run_id), body), attempt)
        if body.outcome == "done" and not _has_final(connection, worker.run_id):
            refused = f"{worker.run_id} has no verified final checkpoint: it can't be done"
            values = {"outcome": "failed", "failure": FailureKind.INTERNAL.value, "message": refused}
        runs.change_attempt(
            connection,
            worker.run_id,
            worker.epoch,
            source=RUNNING,
            target=AttemptState.ENDING,
            now=plane.clock(),
            **values,
        )
    failpoint("server.finish")
    plane.wake.set()
    if refused:
        raise Conflict(refused)


def _last_word(body: Finish, attempt: runs.AttemptRow) -> dict[str, Any]:
    """What is recorded of the worker's own account of its end."""
    message = str((body.error or {}).get("message") or "")[:2000] or None
    if body.outcome == "done":
        return {"outcome": "done"}
    if body.outcome == "failed":
        failure = body.failure or FailureKind.INTERNAL
        return {"outcome": "failed", "failure": failure.value, "message": message, "error": body.error}
    if attempt.stop_reason == "wall_clock":
        said = "the run reached its time limit; its newest checkpoint is kept"
        return {"outcome": "cancelled", "failure": FailureKind.WALL_CLOCK.value, "message": said}
    # It stopped though no one asked here: its machine did (a preemption). A cancel is judged by the wish.
    failure = body.failure or FailureKind.PREEMPTED
    return {"outcome": "cancelled", "failure": failure.value, "message": message}


def _has_final(connection: Connection, run_id: str) -> bool:
    return any(found.final for found in runs.checkpoints_of(connection, run_id))


@router.post("/urls")
def urls(body: SignRequest, worker: Worker, plane: Plane) -> SignAnswer:
    """Addresses in the bucket: to write below the run's own prefix, to read there and in the adapter it starts from."""
    with plane.database.read() as connection:
        _live(connection, worker, body.epoch)
        init = checkpoints.find_init(connection, runs.get_run(connection, worker.run_id))
    _require_addresses(plane)
    given: set[str] = set()
    if init is not None and body.verb != "PUT":
        given = {object_key(init.run_id, sha256) for sha256 in object_digests(init)}
    for key in body.keys:
        if not key.startswith(f"runs/{worker.run_id}/") and key not in given:
            raise Forbidden(f"{key!r:.200} is none of {worker.run_id}'s objects")
    return SignAnswer(urls=tuple(plane.store.sign(body.verb, body.keys, expires_s=SIGNED_S)))


def _require_addresses(plane: Services) -> None:
    if not plane.signs_for_workers:
        raise InvalidInput("this store has no addresses to sign", remedy="this worker has its settings instead")


@router.get("/environment", response_class=Response)
def environment(worker: Worker, plane: Plane) -> Response:
    with plane.database.read() as connection:
        _live(connection, worker, worker.epoch)
        run = runs.get_run(connection, worker.run_id)
    return Response(plane.store.get_bytes(environment_key(run.environment_sha256)), media_type="application/gzip")


@launch_router.post("/hello")
def hello(ticket: Ticket, plane: Plane) -> dict[str, Any]:
    """The worker's start line. Refused once the attempt is claimed, or the engine heard of: the ticket is spent."""
    worker_id = ticket.worker_id
    with plane.database.read() as connection:
        engine = engines.get(connection, worker_id) if worker_id.startswith("engine-") else None
        row = engine or runs.get_attempt(connection, *runs.split_attempt_id(worker_id))
    waited_for = row.state in (EngineState.LAUNCHING, AttemptState.LAUNCHING)
    if not waited_for or not row.token_sha256 or not identity.matches(ticket.token, row.token_sha256):
        raise Conflict(f"{worker_id} is not waited for", remedy="this worker must exit")
    request = LaunchRequest(
        attempt_id=worker_id,
        api_url=plane.api_url,
        token=ticket.token,
        work_dir=row.work_dir,
        device=row.device or "",
        engine=engine_hello(plane, engine, ticket.token).model_dump(mode="json") if engine else None,
    )
    return request.hello("cuda:0" if request.device.startswith("cuda") else "cpu")


@engine_router.post("/heartbeat")
def engine_heartbeat(body: EngineHeartbeat, engine: EngineHost, plane: Plane) -> EngineAnswer:
    return record_heartbeat(plane, engine, body)


@engine_router.post("/urls")
def engine_urls(body: AddressRequest, engine: EngineHost, plane: Plane) -> SignAnswer:
    """Addresses to read by: of the manifests and adapters of runs on the engine's base, and of nothing else."""
    _require_addresses(plane)
    given: set[str] = set()
    with plane.database.read() as connection:
        for run_id in {key.split("/")[1] for key in body.keys if key.startswith("runs/")}:
            if runs.get_run(connection, run_id).spec["model"] != engine.model:
                continue
            for found in runs.checkpoints_of(connection, run_id):
                adapter = object_digests(runs.manifest_of(connection, run_id, found.step), "adapter")
                given |= {manifest_key(run_id, found.step), *(object_key(run_id, sha256) for sha256 in adapter)}
    for key in body.keys:
        if key not in given:
            raise Forbidden(f"{key!r:.200} is of no adapter on {engine.model}")
    return SignAnswer(urls=tuple(plane.store.sign("GET", body.keys, expires_s=SIGNED_S)))
