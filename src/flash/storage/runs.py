"""Runs, attempts, checkpoints, submissions: what is wanted, what was seen, and how it may change.

Owns the rows and their transitions. Every change of state is a compare-and-set with its event in the same
transaction; terminal states are sticky; the user's wish (`desired`) is a column of its own. It decides
nothing: the control plane does, and a transition that came too late simply reports False.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, exists, func, insert, or_, select, tuple_, update

from flash.errors import Conflict, NotFound
from flash.records import (
    AttemptState,
    Checkpoint,
    EventKind,
    FailureKind,
    Heartbeat,
    Manifest,
    Phase,
    RunState,
    WorkerEvent,
)
from flash.storage import schema, vault
from flash.storage.events import NewEvent, append

LIVE_ATTEMPTS = (AttemptState.LAUNCHING.value, AttemptState.RUNNING.value, AttemptState.ENDING.value)
_OPEN = tuple(state.value for state in RunState if not state.terminal)
_MOST_WARNINGS = 100
_LARGEST = 2**53
# Kinds that only the control plane writes: it saw them happen itself.
_OWN_KINDS = frozenset({EventKind.STATE, EventKind.ATTEMPT, EventKind.CHECKPOINT})


@dataclass(frozen=True)
class PricedRow:
    """What a run's cost is told by."""

    state: RunState
    step: int
    active_s: float
    estimate: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class RunRow(PricedRow):
    """One row of `runs`; columns are described in `schema.py`."""

    id: str
    org_id: str
    created_at: float
    updated_at: float
    finished_at: float | None
    config: dict[str, Any]
    spec: dict[str, Any]
    seed: int
    environment_namespace: str
    environment_name: str
    environment_sha256: str
    init_run_id: str | None
    init_step: int | None
    retry_of: str | None
    wall_clock_limit_s: float | None
    desired: str
    phase: Phase | None
    total_steps: int | None
    metrics: dict[str, Any]
    eval: dict[str, Any] | None
    warnings: list[str]
    error: dict[str, Any] | None
    last_seq: int
    retry_at: float | None
    fruitless: int
    micro_batch_divisor: int
    cleaned_at: float | None
    key_id: str | None = None
    gpus: int = 0
    pinned: bool = False
    ttl_s: float | None = None
    collected_at: float | None = None
    silenced_at: float | None = None
    priority: int = 0


@dataclass(frozen=True)
class AttemptRow:
    """One row of `attempts`."""

    run_id: str
    epoch: int
    state: AttemptState
    token_sha256: str = field(repr=False)
    device: str
    work_dir: str
    handle: str | None
    pid: int | None
    created_at: float
    claimed_at: float | None
    heartbeat_at: float | None
    ended_at: float | None
    phase: Phase | None
    step: int
    progress: int
    acknowledged: int
    stop_reason: str | None
    outcome: str | None
    failure: FailureKind | None
    message: str | None
    error: dict[str, Any] | None

    @property
    def id(self) -> str:
        return attempt_id(self.run_id, self.epoch)


@dataclass(frozen=True)
class NewRun:
    """What a submit decided; everything else of a run starts at its beginning."""

    org: str
    config: dict[str, Any]
    spec: dict[str, Any]
    seed: int
    environment_namespace: str
    environment_name: str
    environment_sha256: str
    init_run_id: str | None = None
    init_step: int | None = None
    wall_clock_limit_s: float | None = None
    estimate: dict[str, Any] | None = None
    warnings: Sequence[str] = ()
    retry_of: str | None = None
    step: int = 0  # where a retried run goes on
    total_steps: int | None = None
    micro_batch_divisor: int = 1
    reason: str = "submitted"
    key_id: str | None = None
    gpus: int = 0
    priority: int = 0


def new_run_id(now: float) -> str:
    return f"flash-{int(now)}-{secrets.token_hex(4)}"


def attempt_id(run_id: str, epoch: int) -> str:
    return f"{run_id}.{epoch}"


def split_attempt_id(text: str) -> tuple[str, int]:
    run_id, dot, epoch = text.rpartition(".")
    if not dot or not epoch.isascii() or not epoch.isdigit() or len(epoch) > 9:
        raise NotFound(f"no attempt {text!r:.80}")
    return run_id, int(epoch)


# --- runs -------------------------------------------------------------------------------------------


def insert_run(connection: Connection, new: NewRun, *, now: float, run_id: str | None = None) -> str:
    """Inserts a queued run with its first event; returns its id, a new one unless it was given."""
    run_id = run_id or new_run_id(now)
    connection.execute(
        insert(schema.runs).values(
            id=run_id,
            org_id=new.org,
            created_at=now,
            updated_at=now,
            config=new.config,
            spec=new.spec,
            seed=new.seed,
            environment_namespace=new.environment_namespace,
            environment_name=new.environment_name,
            environment_sha256=new.environment_sha256,
            init_run_id=new.init_run_id,
            init_step=new.init_step,
            wall_clock_limit_s=new.wall_clock_limit_s,
            estimate=new.estimate,
            desired="run",
            state=RunState.QUEUED.value,
            retry_of=new.retry_of,
            step=new.step,
            total_steps=new.total_steps,
            metrics={},
            warnings=list(new.warnings),
            last_seq=0,
            active_s=0.0,
            fruitless=0,
            micro_batch_divisor=new.micro_batch_divisor,
            key_id=new.key_id,
            gpus=new.gpus,
            priority=new.priority,
        )
    )
    first = {"from": None, "to": RunState.QUEUED.value, "reason": new.reason}
    warned = [NewEvent(EventKind.WARNING, {"code": "config", "text": text}, now) for text in new.warnings]
    append(connection, run_id, [NewEvent(EventKind.STATE, first, now), *warned], now=now)
    return run_id


def get_run(connection: Connection, run_id: str, *, org: str | None = None) -> RunRow:
    """The run; another org's run is as absent as one that never was."""
    query = select(schema.runs).where(schema.runs.c.id == run_id.replace("\0", ""))
    if org is not None:
        query = query.where(schema.runs.c.org_id == org)
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"no run {run_id!r:.80}", remedy="`flash runs` lists them")
    return _run(row)


def list_runs(connection: Connection, *, org: str, limit: int, before: str | None = None) -> list[RunRow]:
    """Runs, newest first; `before` is the last id of the page before."""
    table = schema.runs
    query = select(table).where(table.c.org_id == org)
    if before is not None:
        mark = get_run(connection, before, org=org)
        query = query.where(tuple_(table.c.created_at, table.c.id) < tuple_(mark.created_at, mark.id))
    rows = connection.execute(query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit))
    return [_run(row) for row in rows]


def open_runs(connection: Connection) -> list[RunRow]:
    """Runs to reconcile, oldest first: unfinished, or finished with a worker not yet dead."""
    table, attempts = schema.runs, schema.attempts
    # Two small looks at two indexes; an OR of them would read the whole table.
    unfinished = select(table.c.id).where(table.c.state.in_(_OPEN))
    with_worker = select(attempts.c.run_id).where(attempts.c.state.in_(LIVE_ATTEMPTS))
    rows = connection.execute(
        select(table).where(table.c.id.in_(unfinished.union(with_worker))).order_by(table.c.created_at, table.c.id)
    )
    return [_run(row) for row in rows]


def any_open(connection: Connection) -> bool:
    """Whether `open_runs` would find one."""
    table, attempts = schema.runs, schema.attempts
    unfinished = exists().where(table.c.state.in_(_OPEN))
    with_worker = exists().where(attempts.c.state.in_(LIVE_ATTEMPTS))
    return bool(connection.execute(select(or_(unfinished, with_worker))).scalar())


def count_ahead(connection: Connection, run: RunRow) -> int:
    """Runs of its own org that are queued in front of this one."""
    table = schema.runs
    earlier = tuple_(table.c.created_at, table.c.id) < tuple_(run.created_at, run.id)
    before = or_(table.c.priority > run.priority, (table.c.priority == run.priority) & earlier)
    queued = (table.c.org_id == run.org_id) & (table.c.state == RunState.QUEUED.value)
    return int(connection.execute(select(func.count()).where(queued, before)).scalar_one())


def under_way(connection: Connection, *, key_id: str) -> tuple[int, int]:
    """How many unfinished runs a key has, and the GPUs that they take together."""
    table = schema.runs
    query = select(func.count(), func.coalesce(func.sum(table.c.gpus), 0))
    found = connection.execute(query.where(table.c.key_id == key_id, table.c.state.in_(_OPEN))).one()
    return int(found[0]), int(found[1])


def of_key(connection: Connection, *, key_id: str) -> list[PricedRow]:
    """What every run that a key ever submitted is priced by."""
    table = schema.runs
    columns = (table.c.state, table.c.step, table.c.active_s, table.c.estimate)
    rows = connection.execute(select(*columns).where(table.c.key_id == key_id))
    return [PricedRow(RunState(row.state), row.step, row.active_s, row.estimate) for row in rows]


def count_by_state(connection: Connection, *, org: str) -> dict[str, int]:
    """An org's runs by state; every state is named."""
    table = schema.runs
    query = select(table.c.state, func.count()).where(table.c.org_id == org).group_by(table.c.state)
    counted = {str(state): int(count) for state, count in connection.execute(query)}
    return {state.value: counted.get(state.value, 0) for state in RunState}


def count_everyones(connection: Connection) -> dict[tuple[str, str], int]:
    """Runs by org and state, of every org."""
    table = schema.runs
    query = select(table.c.org_id, table.c.state, func.count()).group_by(table.c.org_id, table.c.state)
    return {(str(org), str(state)): int(count) for org, state, count in connection.execute(query)}


def oldest_queued(connection: Connection) -> float | None:
    """When the run that is queued longest was submitted."""
    table = schema.runs
    query = select(func.min(table.c.created_at)).where(table.c.state == RunState.QUEUED.value)
    found = connection.execute(query).scalar()
    return None if found is None else float(found)


def transition(
    connection: Connection,
    run_id: str,
    *,
    source: Sequence[RunState],
    target: RunState,
    reason: str,
    now: float,
    **values: Any,
) -> bool:
    """Moves the run if it is in one of `source`; False, and no event, if it has moved on.

    Entering a terminal state deletes the run's secrets.
    """
    assert not any(state.terminal for state in source), "terminal states are sticky"
    table = schema.runs
    if target.terminal:
        values = {"finished_at": now, "phase": Phase.FINISHED.value, **values}
    before = connection.execute(
        select(table.c.state).where(table.c.id == run_id).with_for_update()
    ).scalar()
    moved = connection.execute(
        update(table)
        .where(table.c.id == run_id, table.c.state == before)
        .where(table.c.state.in_([state.value for state in source]))
        .values(state=target.value, updated_at=now, **values)
    )
    if moved.rowcount == 0:
        return False
    data = {"from": before, "to": target.value, "reason": reason}
    append(connection, run_id, [NewEvent(EventKind.STATE, data, now)], now=now, closing=target.terminal)
    if target.terminal:
        vault.forget(connection, run_id)
    return True


def request_cancel(connection: Connection, run_id: str, *, now: float) -> bool:
    """Records the wish; False if the run has ended or the wish was there before."""
    table = schema.runs
    ended = [state.value for state in RunState if state.terminal]
    state = connection.execute(
        update(table)
        .where(table.c.id == run_id, table.c.desired == "run", table.c.state.not_in(ended))
        .values(desired="cancel", updated_at=now)
        .returning(table.c.state)
    ).scalar()
    if state is None:
        return False
    data = {"from": state, "to": state, "reason": "cancel requested"}
    append(connection, run_id, [NewEvent(EventKind.STATE, data, now)], now=now)
    return True


def set_priority(connection: Connection, run_id: str, priority: int, *, reason: str, now: float) -> bool:
    """False if the run has ended or had that priority."""
    table = schema.runs
    ended = [state.value for state in RunState if state.terminal]
    state = connection.execute(
        update(table)
        .where(table.c.id == run_id, table.c.priority != priority, table.c.state.not_in(ended))
        .values(priority=priority, updated_at=now)
        .returning(table.c.state)
    ).scalar()
    if state is None:
        return False
    data = {"from": state, "to": state, "reason": reason}
    append(connection, run_id, [NewEvent(EventKind.STATE, data, now)], now=now)
    return True


def uncleaned(connection: Connection, *, before: float) -> list[str]:
    """Runs that ended before that time, whose workers are dead and whose leftovers are still there."""
    table, attempts = schema.runs, schema.attempts
    has_worker = exists().where(attempts.c.run_id == table.c.id, attempts.c.state.in_(LIVE_ATTEMPTS))
    query = select(table.c.id).where(table.c.finished_at <= before, table.c.cleaned_at.is_(None), ~has_worker)
    return list(connection.execute(query.limit(100)).scalars())


def note_cleaned(connection: Connection, run_id: str, *, now: float) -> None:
    connection.execute(update(schema.runs).where(schema.runs.c.id == run_id).values(cleaned_at=now))


def unknown(connection: Connection, run_ids: Sequence[str]) -> list[str]:
    """Those of these ids that no run has."""
    table, strangers = schema.runs, []
    for start in range(0, len(run_ids), 500):
        some = list(run_ids[start : start + 500])
        known = set(connection.execute(select(table.c.id).where(table.c.id.in_(some))).scalars())
        strangers += [run_id for run_id in some if run_id not in known]
    return strangers


# --- submissions ------------------------------------------------------------------------------------


def find_submission(connection: Connection, *, org: str, key: str, body_mac: str) -> str | None:
    """The run that this key made before; Conflict if it came with another body."""
    table = schema.submissions
    row = connection.execute(select(table).where(table.c.org_id == org, table.c.key == key)).first()
    if row is None:
        return None
    if not secrets.compare_digest(row.body_mac, body_mac):
        raise Conflict(
            f"Idempotency-Key {key!r:.80} was used for another submit",
            remedy="use a new key for a new request",
        )
    return str(row.run_id)


def record_submission(
    connection: Connection, *, org: str, key: str, body_mac: str, run_id: str, now: float
) -> None:
    values = {"org_id": org, "key": key, "body_mac": body_mac, "run_id": run_id, "created_at": now}
    connection.execute(insert(schema.submissions).values(**values))


# --- attempts ---------------------------------------------------------------------------------------


def insert_attempt(
    connection: Connection,
    run_id: str,
    epoch: int,
    *,
    device: str,
    work_dir: str,
    now: float,
) -> bool:
    """Creates attempt `epoch` of a queued run and moves the run to provisioning; False if it moved on.

    The attempt has no token yet: `issue_token` gives one when it is launched.
    """
    moved = transition(
        connection,
        run_id,
        source=[RunState.QUEUED],
        target=RunState.PROVISIONING,
        reason=f"attempt {epoch} on {device}",
        now=now,
        retry_at=None,
        phase=Phase.STARTING.value,
    )
    if not moved:
        return False
    connection.execute(
        insert(schema.attempts).values(
            run_id=run_id,
            epoch=epoch,
            state=AttemptState.LAUNCHING.value,
            token_sha256="",
            device=device,
            work_dir=work_dir,
            created_at=now,
            step=0,
            progress=0,
            acknowledged=0,
        )
    )
    _tell(connection, run_id, epoch, AttemptState.LAUNCHING, now)
    return True


def get_attempt(connection: Connection, run_id: str, epoch: int) -> AttemptRow:
    table = schema.attempts
    row = connection.execute(select(table).where(table.c.run_id == run_id, table.c.epoch == epoch)).first()
    if row is None:
        raise NotFound(f"no attempt {attempt_id(run_id, epoch)}")
    return _attempt(row)


def attempts_of(connection: Connection, run_ids: Sequence[str]) -> dict[str, list[AttemptRow]]:
    """Every attempt of these runs, oldest first, by run."""
    table = schema.attempts
    found: dict[str, list[AttemptRow]] = {run_id: [] for run_id in run_ids}
    query = select(table).where(table.c.run_id.in_(list(run_ids))).order_by(table.c.run_id, table.c.epoch)
    for row in connection.execute(query):
        found[row.run_id].append(_attempt(row))
    return found


def change_attempt(
    connection: Connection,
    run_id: str,
    epoch: int,
    *,
    source: Sequence[AttemptState],
    now: float,
    target: AttemptState | None = None,
    **values: Any,
) -> bool:
    """Compare-and-set on an attempt; a change of state is told as an event while the run is open."""
    table = schema.attempts
    if target is not None:
        values["state"] = target.value
        if target is AttemptState.ENDED:
            values["ended_at"] = now
    moved = connection.execute(
        update(table)
        .where(table.c.run_id == run_id, table.c.epoch == epoch)
        .where(table.c.state.in_([state.value for state in source]))
        .values(**values)
        .returning(table.c.failure, table.c.message)
    ).first()
    if moved is None:
        return False
    if target is not None and not _ended(connection, run_id):
        _tell(connection, run_id, epoch, target, now, failure=moved.failure, message=moved.message)
    return True


def issue_token(connection: Connection, run_id: str, epoch: int, *, token_sha256: str) -> bool:
    """Sets the token of an attempt that was not launched yet; any token before it is void."""
    table = schema.attempts
    changed = connection.execute(
        update(table)
        .where(table.c.run_id == run_id, table.c.epoch == epoch)
        .where(table.c.state == AttemptState.LAUNCHING.value, table.c.handle.is_(None))
        .values(token_sha256=token_sha256)
    )
    return changed.rowcount == 1


def record_handle(connection: Connection, run_id: str, epoch: int, handle: str) -> None:
    table = schema.attempts
    connection.execute(
        update(table).where(table.c.run_id == run_id, table.c.epoch == epoch).values(handle=handle)
    )


def claim(connection: Connection, attempt: AttemptRow, *, pid: int, now: float) -> bool:
    """The supervisor takes its attempt: it and its run are running now. A lost answer may be asked for again."""
    if attempt.state is AttemptState.RUNNING:
        return attempt.pid == pid and attempt.heartbeat_at is None
    taken = change_attempt(
        connection,
        attempt.run_id,
        attempt.epoch,
        source=[AttemptState.LAUNCHING],
        target=AttemptState.RUNNING,
        now=now,
        pid=pid,
        claimed_at=now,
        phase=Phase.STARTING.value,
    )
    return taken and transition(
        connection,
        attempt.run_id,
        source=[RunState.PROVISIONING],
        target=RunState.RUNNING,
        reason=f"attempt {attempt.epoch} started",
        now=now,
    )


def record_heartbeat(
    connection: Connection, attempt: AttemptRow, beat: Heartbeat, *, active_s: float, now: float
) -> AttemptRow:
    """Stores what the worker is doing; `active_s` is the time to add under its lease. The attempt as it is now."""
    attempts, table = schema.attempts, schema.runs
    beaten = replace(
        attempt, phase=beat.phase, step=_bounded(beat.step), progress=_bounded(beat.progress), heartbeat_at=now
    )
    connection.execute(
        update(attempts)
        .where(attempts.c.run_id == attempt.run_id, attempts.c.epoch == attempt.epoch)
        .values(phase=beat.phase.value, step=beaten.step, progress=beaten.progress, heartbeat_at=now)
    )
    connection.execute(
        update(table)
        .where(table.c.id == attempt.run_id)
        .values(phase=beat.phase.value, active_s=table.c.active_s + active_s, updated_at=now)
    )
    return beaten


def record_events(
    connection: Connection, attempt: AttemptRow, events: Sequence[WorkerEvent], *, now: float
) -> int:
    """Adds what continues the attempt's history and returns its watermark.

    Events at or below the watermark were stored before; those behind a gap are left for the worker to send
    again from the watermark on.
    """
    watermark = attempt.acknowledged
    fresh: list[WorkerEvent] = []
    for event in sorted(events, key=lambda event: event.n):
        if event.n == watermark + 1:
            fresh.append(event)
            watermark = event.n
    if not fresh:
        return watermark
    kept = [event for event in fresh if event.kind not in _OWN_KINDS]
    stored = [
        NewEvent(e.kind, e.data, e.time if math.isfinite(e.time) else now, epoch=attempt.epoch, n=e.n)
        for e in kept
    ]
    append(connection, attempt.run_id, stored, now=now)
    table = schema.attempts
    connection.execute(
        update(table)
        .where(table.c.run_id == attempt.run_id, table.c.epoch == attempt.epoch)
        .values(acknowledged=watermark)
    )
    _fold(connection, attempt, kept)
    return watermark


def _fold(connection: Connection, attempt: AttemptRow, events: Sequence[WorkerEvent]) -> None:
    """Keeps the latest step, phase, metrics, eval and warnings in the run's row, for quick answers."""
    run = get_run(connection, attempt.run_id)
    values: dict[str, Any] = {}
    metrics, warnings = dict(run.metrics), list(run.warnings)
    for event in events:
        data = event.data
        if event.kind is EventKind.METRICS:
            reported = data.get("values")
            metrics.update(reported if isinstance(reported, dict) else {})
            values["metrics"] = metrics
        elif event.kind is EventKind.EVAL:
            values["eval"] = data
        elif event.kind is EventKind.WARNING and isinstance(data.get("text"), str):
            if data["text"] not in warnings and len(warnings) < _MOST_WARNINGS:
                warnings.append(data["text"])
                values["warnings"] = warnings
        elif event.kind is EventKind.PHASE and data.get("phase") in [phase.value for phase in Phase]:
            values["phase"] = data["phase"]
        if event.kind in (EventKind.METRICS, EventKind.PHASE):
            values |= {key: data[key] for key in ("step", "total_steps") if _count(data.get(key))}
    if values:
        connection.execute(update(schema.runs).where(schema.runs.c.id == run.id).values(**values))


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _bounded(count: int) -> int:
    """A worker's count as a number that any column holds."""
    return min(max(count, 0), _LARGEST)


# --- checkpoints ------------------------------------------------------------------------------------


def record_checkpoint(
    connection: Connection, manifest: Manifest, *, epoch: int, manifest_sha256: str, now: float
) -> None:
    """Makes a verified checkpoint visible; the same one again changes nothing.

    A step that turns out to be the last one may be recorded anew as final; any other change is a Conflict.
    """
    table = schema.checkpoints
    same_step = (table.c.run_id == manifest.run_id) & (table.c.step == manifest.step)
    known = connection.execute(select(table.c.manifest_sha256, table.c.final).where(same_step)).first()
    if known is not None and known.manifest_sha256 == manifest_sha256:
        return
    values = {
        "final": manifest.final,
        "epoch": epoch,
        "created_at": manifest.created_at,
        "manifest_sha256": manifest_sha256,
        "manifest": manifest.model_dump(mode="json"),
        "has_state": any(file.path.startswith("state/") for file in manifest.files),
    }
    if known is None:
        connection.execute(insert(table).values(run_id=manifest.run_id, step=manifest.step, **values))
    elif manifest.final and not known.final:
        connection.execute(update(table).where(same_step).values(**values))
    else:
        raise Conflict(f"step {manifest.step} of {manifest.run_id} is recorded with another manifest")
    data = {"step": manifest.step, "ref": f"{manifest.run_id}/step-{manifest.step}", "final": manifest.final}
    append(
        connection, manifest.run_id, [NewEvent(EventKind.CHECKPOINT, data, now, epoch=epoch)], now=now
    )


def checkpoints_of(connection: Connection, run_id: str) -> list[Checkpoint]:
    """Recorded checkpoints, oldest first."""
    table = schema.checkpoints
    rows = connection.execute(select(table).where(table.c.run_id == run_id).order_by(table.c.step))
    return [
        Checkpoint(
            run_id=row.run_id,
            step=row.step,
            final=row.final,
            epoch=row.epoch,
            created_at=row.created_at,
            manifest_sha256=row.manifest_sha256,
            has_state=row.has_state,
        )
        for row in rows
    ]


def epochs_with_checkpoints(connection: Connection, run_ids: Sequence[str]) -> set[tuple[str, int]]:
    """The attempts of these runs that brought a checkpoint."""
    table = schema.checkpoints
    query = select(table.c.run_id, table.c.epoch).where(table.c.run_id.in_(list(run_ids))).distinct()
    return {(row.run_id, row.epoch) for row in connection.execute(query)}


def manifest_of(connection: Connection, run_id: str, step: int) -> Manifest:
    table = schema.checkpoints
    found = connection.execute(
        select(table.c.manifest).where(table.c.run_id == run_id, table.c.step == step)
    ).scalar()
    if found is None:
        raise NotFound(
            f"no checkpoint {run_id}/step-{step}", remedy=f"`flash checkpoints {run_id}` lists them"
        )
    return Manifest.model_validate(found)


def drop_checkpoint(connection: Connection, run_id: str, step: int, *, reason: str, now: float) -> None:
    """Takes back a checkpoint whose files turned out damaged, and says so."""
    table = schema.checkpoints
    connection.execute(table.delete().where(table.c.run_id == run_id, table.c.step == step))
    text = f"{run_id}/step-{step} is damaged and was dropped: {reason}"
    data = {"code": "damaged_checkpoint", "text": text}
    append(connection, run_id, [NewEvent(EventKind.WARNING, data, now)], now=now)


def forget_state(connection: Connection, run_id: str, steps: Sequence[int]) -> None:
    """Notes that the optimizer state of these checkpoints is no longer kept."""
    table = schema.checkpoints
    connection.execute(
        update(table).where(table.c.run_id == run_id, table.c.step.in_(list(steps))).values(has_state=False)
    )


# --- rows -------------------------------------------------------------------------------------------


def _tell(
    connection: Connection,
    run_id: str,
    epoch: int,
    state: AttemptState,
    now: float,
    *,
    failure: str | None = None,
    message: str | None = None,
) -> None:
    data: dict[str, Any] = {"epoch": epoch, "state": state.value}
    data |= {"failure": failure} if failure else {}
    data |= {"message": message} if message else {}
    append(connection, run_id, [NewEvent(EventKind.ATTEMPT, data, now, epoch=epoch)], now=now)


def _ended(connection: Connection, run_id: str) -> bool:
    state = connection.execute(select(schema.runs.c.state).where(schema.runs.c.id == run_id)).scalar_one()
    return RunState(str(state)).terminal


def _run(row: Any) -> RunRow:
    values: Mapping[str, Any] = row._mapping
    phase = Phase(values["phase"]) if values["phase"] else None
    return RunRow(**{**values, "state": RunState(values["state"]), "phase": phase})


def _attempt(row: Any) -> AttemptRow:
    values: Mapping[str, Any] = row._mapping
    return AttemptRow(
        **{
            **values,
            "state": AttemptState(values["state"]),
            "phase": Phase(values["phase"]) if values["phase"] else None,
            "failure": FailureKind(values["failure"]) if values["failure"] else None,
        }
    )


