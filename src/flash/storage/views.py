"""Questions that only pages ask: what changed, what came of a run, which versions an environment has had.

Reads only. What a run, an event or a version is, the other modules of this folder say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Text, func, or_, select, type_coerce

from flash.errors import NotFound
from flash.records import EnvironmentVersion, Event, EventKind
from flash.storage import environments, schema
from flash.storage.runs import RunRow, get_run

_ESCAPE = "!"


def changed_since(connection: Connection, *, org: str, since: float, limit: int) -> list[RunRow]:
    """Runs that changed at or after `since`, the newest change first."""
    table = schema.runs
    ids = connection.execute(
        select(table.c.id)
        .where(table.c.org_id == org, table.c.updated_at >= since)
        .order_by(table.c.updated_at.desc())
        .limit(limit)
    ).scalars()
    return [get_run(connection, run_id, org=org) for run_id in ids.all()]


def live_steps(connection: Connection, run_ids: Sequence[str]) -> dict[str, int]:
    """The step that each run's name answers with, for those that are deployed."""
    table = schema.deployments
    rows = connection.execute(
        select(table.c.run_id, table.c.step).where(table.c.run_id.in_(list(run_ids)), table.c.step.is_not(None))
    )
    return {row.run_id: row.step for row in rows}


@dataclass(frozen=True)
class Kin:
    """A run that came of another one, and how."""

    run_id: str
    state: str
    how: str  # warm start | retry
    step: int | None


def came_of(connection: Connection, run_id: str) -> list[Kin]:
    """The runs that began from this one's adapter or state, oldest first."""
    table = schema.runs
    rows = connection.execute(
        select(table.c.id, table.c.state, table.c.retry_of, table.c.init_step)
        .where(or_(table.c.init_run_id == run_id, table.c.retry_of == run_id))
        .order_by(table.c.created_at)
        .limit(100)
    )
    return [
        Kin(row.id, row.state, "retry" if row.retry_of == run_id else "warm start", row.init_step) for row in rows
    ]


# --- logs -----------------------------------------------------------------------------------------------------


def log_lines(
    connection: Connection,
    run_id: str,
    *,
    kinds: Sequence[EventKind],
    after: int | None = None,
    before: int | None = None,
    find: str = "",
    limit: int = 500,
) -> list[Event]:
    """Up to `limit` lines in order: those next to `after`, else the last ones (before `before`).

    `find` is looked for as it stands, whatever its case, in what the line says.
    """
    table = schema.events
    query = select(table).where(table.c.run_id == run_id, table.c.kind.in_([kind.value for kind in kinds]))
    if after is not None:
        query = query.where(table.c.seq > after)
    if before is not None:
        query = query.where(table.c.seq < before)
    if find:
        # Rows are JSON in ASCII: look for the text as it stands there.
        inside = json.dumps(find)[1:-1]
        for special in (_ESCAPE, "%", "_"):
            inside = inside.replace(special, _ESCAPE + special)
        query = query.where(type_coerce(table.c.data, Text).ilike(f"%{inside}%", escape=_ESCAPE))
    forward = after is not None
    rows = connection.execute(query.order_by(table.c.seq if forward else table.c.seq.desc()).limit(limit)).all()
    found = [
        Event(
            run_id=row.run_id, seq=row.seq, time=row.time, kind=EventKind(row.kind), epoch=row.epoch, data=row.data
        )
        for row in rows
    ]
    return found if forward else found[::-1]


# --- environments ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VersionUse:
    version: EnvironmentVersion
    push: int  # rises with each push of the name; 0: fetched from elsewhere, never offered
    offered: bool
    runs: int


def versions(connection: Connection, *, org: str, namespace: str, name: str) -> list[VersionUse]:
    """Every version that the org ever pushed or ran under this name, the current one first."""
    table, runs = schema.environment_versions, schema.runs
    counted = (
        select(runs.c.environment_sha256, func.count())
        .where(runs.c.org_id == org, runs.c.environment_namespace == namespace, runs.c.environment_name == name)
        .group_by(runs.c.environment_sha256)
    )
    uses = {row[0]: int(row[1]) for row in connection.execute(counted)}
    rows = connection.execute(
        select(table)
        .where(
            table.c.org_id == org,
            table.c.namespace == namespace,
            table.c.name == name,
            table.c.push != environments.LEAVING,
        )
        .order_by(table.c.push.desc(), table.c.created_at.desc())
    ).all()
    if not rows:
        raise NotFound(f"no environment {namespace}/{name}", remedy="`flash env list` shows what there is")
    return [
        VersionUse(
            EnvironmentVersion(
                namespace=row.namespace,
                name=row.name,
                sha256=row.sha256,
                size=row.size,
                files=tuple(row.files),
                created_at=row.created_at,
            ),
            push=row.push,
            offered=row.deleted_at is None,
            runs=uses.get(row.sha256, 0),
        )
        for row in rows
    ]


def runs_of(connection: Connection, *, org: str, namespace: str, name: str, limit: int) -> list[RunRow]:
    """The newest runs on any version of an environment."""
    table = schema.runs
    ids = connection.execute(
        select(table.c.id)
        .where(table.c.org_id == org, table.c.environment_namespace == namespace, table.c.environment_name == name)
        .order_by(table.c.created_at.desc())
        .limit(limit)
    ).scalars()
    return [get_run(connection, run_id, org=org) for run_id in ids.all()]
