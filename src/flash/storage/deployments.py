"""Deployments: a run's name and the revision that it answers with.

Owns the rows: revisions, which never change; one name a run, moved by compare-and-set on its version; and the
history of its moves, written in the same transaction. It decides nothing: not what may be deployed, nor when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from flash.errors import Conflict
from flash.records import Revision
from flash.storage import schema


@dataclass(frozen=True)
class DeploymentRow:
    """A name as it is: `revision` and its manifest's key in the store, or neither after an undeploy."""

    run_id: str
    org: str
    version: int
    updated_at: float
    revision: Revision | None
    manifest_key: str | None


def find(connection: Connection, run_id: str) -> DeploymentRow | None:
    """The run's name, live or taken back; None if it was never deployed."""
    table = schema.deployments
    row = connection.execute(_joined().where(table.c.run_id == run_id.replace("\0", ""))).first()
    return None if row is None else _deployment(row)


def list_live(connection: Connection, *, org: str) -> list[DeploymentRow]:
    """An org's live names, newest first."""
    table = schema.deployments
    query = _joined().where(table.c.org_id == org, table.c.step.is_not(None))
    rows = connection.execute(query.order_by(table.c.updated_at.desc(), table.c.run_id))
    return [_deployment(row) for row in rows]


def count_live(connection: Connection) -> int:
    table = schema.deployments
    query = select(func.count()).select_from(table).where(table.c.step.is_not(None))
    return int(connection.execute(query).scalar_one())


def move(
    connection: Connection,
    revision: Revision,
    *,
    org: str,
    manifest_key: str,
    expected: int,
    verified: bool,
    now: float,
) -> int:
    """Points the run's name at the revision; returns the name's new version.

    `expected` is the version that the caller saw (0: none). Conflict if someone moved the name since.
    """
    _keep(connection, revision, org=org, manifest_key=manifest_key, now=now)
    return _set(connection, revision.run_id, revision, org=org, expected=expected, verified=verified, now=now)


def remove(connection: Connection, run_id: str, *, org: str, expected: int, now: float) -> int:
    """Takes the run's name back; returns the name's new version."""
    return _set(connection, run_id, None, org=org, expected=expected, verified=False, now=now)


def history(connection: Connection, run_id: str) -> list[dict[str, Any]]:
    """Every move of the name, oldest first."""
    table = schema.deployment_history
    rows = connection.execute(select(table).where(table.c.run_id == run_id).order_by(table.c.version))
    return [dict(row._mapping) for row in rows]


def _keep(connection: Connection, revision: Revision, *, org: str, manifest_key: str, now: float) -> None:
    table = schema.revisions
    same = (
        (table.c.run_id == revision.run_id)
        & (table.c.step == revision.step)
        & (table.c.adapter_sha256 == revision.adapter_sha256)
    )
    if connection.execute(select(table.c.step).where(same)).first() is None:
        connection.execute(
            insert(table).values(
                run_id=revision.run_id,
                step=revision.step,
                adapter_sha256=revision.adapter_sha256,
                org_id=org,
                model=revision.model,
                manifest_key=manifest_key,
                created_at=now,
            )
        )


def _set(
    connection: Connection,
    run_id: str,
    revision: Revision | None,
    *,
    org: str,
    expected: int,
    verified: bool,
    now: float,
) -> int:
    table = schema.deployments
    before = connection.execute(
        select(table.c.version, table.c.step).where(table.c.run_id == run_id).with_for_update()
    ).first()
    if (before.version if before else 0) != expected:
        raise Conflict(f"{run_id} was deployed or undeployed by someone else meanwhile", remedy="look, and try again")
    version = expected + 1
    step = revision.step if revision else None
    sha256 = revision.adapter_sha256 if revision else None
    values = {"version": version, "step": step, "adapter_sha256": sha256, "updated_at": now}
    if before is None:
        connection.execute(insert(table).values(run_id=run_id, org_id=org, created_at=now, **values))
    else:
        connection.execute(update(table).where(table.c.run_id == run_id, table.c.version == expected).values(**values))
    connection.execute(
        insert(schema.deployment_history).values(
            run_id=run_id,
            version=version,
            time=now,
            action="deploy" if revision else "undeploy",
            from_step=before.step if before else None,
            to_step=step,
            adapter_sha256=sha256,
            verified=verified,
        )
    )
    return version


def _joined() -> Any:
    table, revisions = schema.deployments, schema.revisions
    same = (
        (revisions.c.run_id == table.c.run_id)
        & (revisions.c.step == table.c.step)
        & (revisions.c.adapter_sha256 == table.c.adapter_sha256)
    )
    return select(table, revisions.c.model, revisions.c.manifest_key).outerjoin(revisions, same)


def _deployment(row: Any) -> DeploymentRow:
    revision = None
    if row.step is not None:
        revision = Revision(run_id=row.run_id, step=row.step, adapter_sha256=row.adapter_sha256, model=row.model)
    return DeploymentRow(
        run_id=row.run_id,
        org=row.org_id,
        version=row.version,
        updated_at=row.updated_at,
        revision=revision,
        manifest_key=row.manifest_key,
    )
