"""The audit log: who did, or tried, what, when, from where, and what came of it. Only ever added to.

Owns the rows and their reading. Knows neither HTTP nor who may look; values of requests, which may be secret, are
never part of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from flash.storage import schema

ANONYMOUS = "anonymous"
SERVER = "server"
_table = schema.audit
_AT_ONCE = 2000  # entries


@dataclass(frozen=True)
class Entry:
    """`status` is HTTP's, also where no HTTP was: 2xx it was done, 4xx it was refused."""

    action: str
    status: int
    org: str | None = None
    actor: str = ANONYMOUS  # a key's id, or one of the words above
    name: str | None = None  # of the key
    address: str | None = None
    object: str | None = None
    message: str | None = None
    time: float = 0.0
    id: int = 0  # 0: not recorded yet


def record(connection: Connection, entry: Entry, *, now: float) -> None:
    connection.execute(
        insert(_table).values(
            time=now,
            org_id=_cut(entry.org, 64),
            actor=entry.actor[:64],
            name=_cut(entry.name, 200),
            address=_cut(entry.address, 100),
            action=entry.action[:100],
            object=_cut(entry.object, 500),
            status=entry.status,
            message=_cut(entry.message, 500),
        )
    )


def read(connection: Connection, *, org: str | None, limit: int, before: int | None = None) -> list[Entry]:
    """Entries, newest first: one org's, or with None everyone's and nobody's; `before` is an entry's id."""
    query = select(_table)
    if org is not None:
        query = query.where(_table.c.org_id == org)
    if before is not None:
        query = query.where(_table.c.id < before)
    return [_entry(row) for row in connection.execute(query.order_by(_table.c.id.desc()).limit(limit))]


def older(connection: Connection, *, before: float) -> list[int]:
    """Ids of entries older than that time, as many as one transaction may remove."""
    query = select(_table.c.id).where(_table.c.time < before).order_by(_table.c.id)
    return list(connection.execute(query.limit(_AT_ONCE)).scalars())


def forget(connection: Connection, ids: Sequence[int]) -> None:
    connection.execute(delete(_table).where(_table.c.id.in_(ids)))


def _cut(text: str | None, limit: int) -> str | None:
    return None if text is None else text[:limit]


def _entry(row: Any) -> Entry:
    return Entry(
        action=row.action,
        status=row.status,
        org=row.org_id,
        actor=row.actor,
        name=row.name,
        address=row.address,
        object=row.object,
        message=row.message,
        time=row.time,
        id=row.id,
    )
