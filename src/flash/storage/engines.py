"""Engines: which there are, what was seen of them, and how that may change.

Owns the rows and their compare-and-sets. An engine of a base is wanted by inserting it; the control plane's
reconciler gives it a device, starts it and sees it off. It decides nothing here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from flash.errors import NotFound
from flash.records import EngineState, EngineView
from flash.storage import schema
from flash.storage.database import touch

USABLE = (EngineState.WAITING, EngineState.LAUNCHING, EngineState.LOADING, EngineState.READY)
LIVE = (*USABLE, EngineState.DRAINING, EngineState.ENDING)


@dataclass(frozen=True)
class EngineRow:
    """One row of `engines`; columns are described in `schema.py`."""

    id: str
    model: str
    state: EngineState
    device: str | None
    work_dir: str
    token_sha256: str = field(repr=False)
    sealed_token: bytes | None = field(repr=False)
    handle: str | None
    pid: int | None
    url: str | None
    created_at: float
    ready_at: float | None
    heartbeat_at: float | None
    ended_at: float | None
    in_flight: int
    stats: dict[str, float]
    reason: str | None
    error: dict[str, Any] | None

    @property
    def view(self) -> EngineView:
        return EngineView(
            engine_id=self.id,
            model=self.model,
            state=self.state,
            device=self.device,
            reason=self.reason,
            started_at=self.ready_at,
        )


def new_engine_id(now: float) -> str:
    return f"engine-{int(now)}-{secrets.token_hex(4)}"


def usable(connection: Connection, model: str) -> EngineRow | None:
    """The engine that serves this base, or is on its way to; the newest, where there are two."""
    table = schema.engines
    query = select(table).where(table.c.model == model, table.c.state.in_(_names(USABLE)))
    row = connection.execute(query.order_by(table.c.created_at.desc(), table.c.id.desc())).first()
    return None if row is None else _engine(row)


def want(connection: Connection, model: str, *, work_root: str, now: float) -> EngineRow:
    """The base's usable engine, put into the queue if there is none; one in the queue learns that it is waited for."""
    table = schema.engines
    found = usable(connection, model)
    if found is None:
        engine_id = new_engine_id(now)
        connection.execute(
            insert(table).values(
                id=engine_id,
                model=model,
                state=EngineState.WAITING.value,
                work_dir=f"{work_root}/{engine_id}",
                token_sha256="",
                created_at=now,
                heartbeat_at=now,
                in_flight=0,
                stats={},
            )
        )
        return get(connection, engine_id)
    waiting = (table.c.id == found.id) & (table.c.state == EngineState.WAITING.value)
    connection.execute(update(table).where(waiting).values(heartbeat_at=now))
    return found


def get(connection: Connection, engine_id: str) -> EngineRow:
    table = schema.engines
    row = connection.execute(select(table).where(table.c.id == engine_id.replace("\0", ""))).first()
    if row is None:
        raise NotFound(f"no engine {engine_id!r:.80}")
    return _engine(row)


def live(connection: Connection) -> list[EngineRow]:
    """Engines not known dead, oldest first."""
    table = schema.engines
    rows = connection.execute(
        select(table).where(table.c.state.in_(_names(LIVE))).order_by(table.c.created_at, table.c.id)
    )
    return [_engine(row) for row in rows]


def change(
    connection: Connection,
    engine_id: str,
    *,
    source: Sequence[EngineState],
    now: float,
    target: EngineState | None = None,
    **values: Any,
) -> bool:
    """Compare-and-set; whoever waits for the engine (`Database.on_commit`) is woken. False: it moved on."""
    table = schema.engines
    if target is not None:
        values["state"] = target.value
    if target is EngineState.ENDED:
        values |= {"ended_at": now, "sealed_token": None, "in_flight": 0}
    changed = connection.execute(
        update(table).where(table.c.id == engine_id, table.c.state.in_(_names(source))).values(**values)
    )
    if changed.rowcount == 0:
        return False
    touch(connection, engine_id)
    return True


def issue_token(connection: Connection, engine_id: str, *, sha256: str, sealed: bytes) -> bool:
    """Sets the token of an engine that was not launched yet; any token before it is void."""
    table = schema.engines
    changed = connection.execute(
        update(table)
        .where(table.c.id == engine_id, table.c.state == EngineState.LAUNCHING.value, table.c.handle.is_(None))
        .values(token_sha256=sha256, sealed_token=sealed)
    )
    return changed.rowcount == 1


def record_heartbeat(
    connection: Connection, engine_id: str, *, in_flight: int, stats: Mapping[str, float], now: float
) -> None:
    table = schema.engines
    connection.execute(
        update(table)
        .where(table.c.id == engine_id)
        .values(heartbeat_at=now, in_flight=in_flight, stats=dict(stats))
    )


def ended(connection: Connection, *, before: float) -> list[EngineRow]:
    """Engines that were known dead at that time, for cleaning."""
    table = schema.engines
    query = select(table).where(table.c.state == EngineState.ENDED.value, table.c.ended_at <= before)
    return [_engine(row) for row in connection.execute(query.limit(100))]


def forget(connection: Connection, engine_id: str) -> None:
    connection.execute(delete(schema.engines).where(schema.engines.c.id == engine_id))


def _names(states: Sequence[EngineState]) -> list[str]:
    return [state.value for state in states]


def _engine(row: Any) -> EngineRow:
    values: Mapping[str, Any] = row._mapping
    return EngineRow(**{**values, "state": EngineState(values["state"])})
