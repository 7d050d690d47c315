"""What may go when its time is over, and what still needs it.

Owns the choice and the marks: rows of checkpoints and events go here, and environment versions leave, in one
transaction with the look at who needs them, so that nothing can come to need them in between. Each takes a bounded
number of rows, since nobody else can write meanwhile. The files behind them go later, by the rule that a file which no
row names is nobody's (`control_plane.cleaning`). A run itself always stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Column, ColumnElement, Connection, and_, delete, exists, func, or_, select, update

from flash.records import RunState
from flash.storage import environments, schema
from flash.storage.runs import LIVE_ATTEMPTS

_ENDED = tuple(state.value for state in RunState if state.terminal)
_AT_ONCE = 20  # runs, or versions, of each kind in one transaction
_ROWS = 500  # events and what belongs to them in one transaction
DAY_S = 86400.0


@dataclass(frozen=True)
class Times:
    """Seconds from a run's end; None: for good."""

    state_s: float | None = None
    files_s: float | None = None
    events_s: float | None = None
    audit_s: float | None = None


def expire_states(connection: Connection, times: Times, *, now: float) -> list[str]:
    """Ended runs whose optimizer state is no longer kept from now on."""
    if times.state_s is None:
        return []
    table, runs = schema.checkpoints, schema.runs
    query = (
        select(table.c.run_id)
        .distinct()
        .join(runs, runs.c.id == table.c.run_id)
        .where(table.c.has_state, _over(), ~runs.c.pinned, runs.c.finished_at <= now - times.state_s)
    )
    found = list(connection.execute(query.limit(_AT_ONCE)).scalars())
    connection.execute(update(table).where(table.c.run_id.in_(found)).values(has_state=False))
    _to_clean(connection, found)
    return found


def expire_files(connection: Connection, times: Times, *, now: float) -> list[str]:
    """Ended runs whose checkpoints are gone from now on: nobody needs them and their time is over."""
    runs = schema.runs
    kept_s = func.coalesce(runs.c.ttl_s, times.files_s) if times.files_s is not None else runs.c.ttl_s
    query = select(runs.c.id).where(
        runs.c.collected_at.is_(None), _over(), ~runs.c.pinned, runs.c.finished_at + kept_s <= now, ~_needed()
    )
    found = list(connection.execute(query.order_by(runs.c.finished_at).limit(_AT_ONCE)).scalars())
    connection.execute(delete(schema.checkpoints).where(schema.checkpoints.c.run_id.in_(found)))
    connection.execute(update(runs).where(runs.c.id.in_(found)).values(collected_at=now))
    _to_clean(connection, found)
    return found


def expire_events(connection: Connection, times: Times, *, now: float) -> list[str]:
    """Ended runs whose log, metrics and samples go, a part of them each time; empty when there is nothing left to go.

    A run counts as silenced from when its last row is gone.
    """
    if times.events_s is None:
        return []
    runs = schema.runs
    query = select(runs.c.id).where(
        runs.c.silenced_at.is_(None), _over(), ~runs.c.pinned, runs.c.finished_at <= now - times.events_s
    )
    found = list(connection.execute(query.order_by(runs.c.finished_at).limit(_AT_ONCE)).scalars())
    left, silenced = _ROWS, []
    for run_id in found:
        for key in (schema.events.c.seq, schema.metric_blocks.c.position, schema.samples.c.seq):
            left -= _delete_first(connection, key, run_id, left)
        if left == 0:  # there may be more of it
            break
        silenced.append(run_id)
    connection.execute(update(runs).where(runs.c.id.in_(silenced)).values(silenced_at=now))
    return found[: len(silenced) + 1]


def _delete_first(connection: Connection, key: Column[int], run_id: str, limit: int) -> int:
    """Deletes the first rows of a run from the table that is ordered by `key`; how many."""
    first = select(key).where(key.table.c.run_id == run_id).order_by(key).limit(limit)
    gone = connection.execute(delete(key.table).where(key.table.c.run_id == run_id, key.in_(first)))
    return int(gone.rowcount)


def expire_environments(connection: Connection, times: Times, *, now: float) -> None:
    """Has versions leave: of names long deleted, which no run could still need."""
    if times.files_s is None:
        return
    table, runs = schema.environment_versions, schema.runs
    could_need = exists().where(
        runs.c.environment_sha256 == table.c.sha256,
        runs.c.state != RunState.DONE.value,  # an open one needs it, and one that failed when it is retried
        runs.c.collected_at.is_(None),
    )
    query = select(table.c.namespace, table.c.name, table.c.sha256).where(
        table.c.deleted_at <= now - times.files_s, table.c.push != environments.LEAVING, ~could_need
    )
    for row in connection.execute(query.limit(_AT_ONCE)).all():
        environments.leave(connection, namespace=row.namespace, name=row.name, sha256=row.sha256)


def keep(connection: Connection, run_id: str, *, pinned: bool, ttl_s: float | None) -> None:
    """How long a run's files are kept: for good, for a time of their own, or (neither) for the server's."""
    runs = schema.runs
    connection.execute(update(runs).where(runs.c.id == run_id).values(pinned=pinned, ttl_s=ttl_s))


def _over() -> ColumnElement[bool]:
    """The run has ended and its worker is known dead."""
    runs, attempts = schema.runs, schema.attempts
    has_worker = exists().where(attempts.c.run_id == runs.c.id, attempts.c.state.in_(LIVE_ATTEMPTS))
    return and_(runs.c.state.in_(_ENDED), ~has_worker)


def _needed() -> ColumnElement[bool]:
    """Somebody needs the run's files: its live name, or a warm start from it that is open or may be retried."""
    runs, deployments, later = schema.runs, schema.deployments, schema.runs.alias("later")
    return or_(
        exists().where(deployments.c.run_id == runs.c.id, deployments.c.step.is_not(None)),
        exists().where(
            later.c.init_run_id == runs.c.id,
            later.c.state != RunState.DONE.value,
            later.c.collected_at.is_(None),
        ),
    )


def _to_clean(connection: Connection, run_ids: list[str]) -> None:
    """Has the cleaner look once more at what no row names."""
    runs = schema.runs
    connection.execute(update(runs).where(runs.c.id.in_(run_ids)).values(cleaned_at=None))
