"""A run's append-only history: contiguous `seq` per run, worker events de-duplicated by their own count.

Owns numbering and reading. Events are added inside the caller's transaction, beside the change they tell of;
a run that has ended takes no more. What pages need beside the events themselves (`series`, `samples`) is kept in
the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, update

from flash.errors import Conflict, NotFound
from flash.records import Event, EventKind, RunState
from flash.storage import samples, schema, series
from flash.storage.database import touch

TERMINAL = tuple(state.value for state in RunState if state.terminal)


@dataclass(frozen=True)
class NewEvent:
    kind: EventKind
    data: dict[str, Any]
    time: float
    epoch: int | None = None
    n: int | None = None  # the worker's count within its attempt


def append(
    connection: Connection, run_id: str, new: Sequence[NewEvent], *, now: float, closing: bool = False
) -> int:
    """Adds events in order and returns the last `seq`. Only the event that ends a run is `closing`."""
    runs = schema.runs
    statement = update(runs).where(runs.c.id == run_id)
    if not closing:
        statement = statement.where(runs.c.state.not_in(TERMINAL))
    # The row's lock makes numbering serial per run on Postgres too.
    last = connection.execute(
        statement.values(last_seq=runs.c.last_seq + len(new), updated_at=now).returning(runs.c.last_seq)
    ).scalar()
    if last is None:
        raise Conflict(f"run {run_id} has ended and takes no more events")
    if new:
        first = int(last) - len(new) + 1
        connection.execute(
            insert(schema.events),
            [
                {
                    "run_id": run_id,
                    "seq": first + offset,
                    "time": event.time,
                    "kind": event.kind.value,
                    "epoch": event.epoch,
                    "n": event.n,
                    "data": event.data,
                }
                for offset, event in enumerate(new)
            ],
        )
        series.fold(connection, run_id, _of_kind(new, first, EventKind.METRICS))
        samples.note(connection, run_id, _of_kind(new, first, EventKind.SAMPLE))
    touch(connection, run_id)
    return int(last)


def _of_kind(new: Sequence[NewEvent], first: int, kind: EventKind) -> list[series.Reported]:
    return [
        (first + offset, event.epoch, event.time, event.data) for offset, event in enumerate(new) if event.kind is kind
    ]


def read(
    connection: Connection,
    run_id: str,
    *,
    after: int = 0,
    kinds: Sequence[str] | None = None,
    limit: int = 1000,
) -> list[Event]:
    """Events with `seq > after`, oldest first."""
    table = schema.events
    query = select(table).where(table.c.run_id == run_id, table.c.seq > after)
    if kinds:
        query = query.where(table.c.kind.in_(list(kinds)))
    rows = connection.execute(query.order_by(table.c.seq).limit(limit))
    return [
        Event(
            run_id=row.run_id,
            seq=row.seq,
            time=row.time,
            kind=EventKind(row.kind),
            epoch=row.epoch,
            data=row.data,
        )
        for row in rows
    ]


def last_seq(connection: Connection, run_id: str) -> int:
    found = connection.execute(select(schema.runs.c.last_seq).where(schema.runs.c.id == run_id)).scalar()
    if found is None:
        raise NotFound(f"no run {run_id}")
    return int(found)
