"""Which samples a run kept, and what is to be said of each in numbers: steps, rewards, marks.

Owns the index that finds the best, the worst and the disagreeing among ten thousand without reading them. The
samples themselves are events; `read` fetches the few that a page shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, func, insert, select

from flash.records import Event, EventKind
from flash.storage import schema
from flash.storage.series import Reported

Order = Literal["newest", "oldest", "best", "worst", "disagreeing"]
Mark = Literal["truncated", "failed"]
_table = schema.samples


@dataclass(frozen=True)
class SampleRow:
    seq: int
    epoch: int | None
    step: int
    kind: str
    row: int | None
    reward: float | None
    spread: float | None
    truncated: bool
    failed: bool


def note(connection: Connection, run_id: str, reported: Sequence[Reported]) -> None:
    """Adds sample events to the index. `data` comes from a worker: what is not as expected counts as absent."""
    rows = [{"run_id": run_id, "seq": seq, "epoch": epoch, **_facts(data)} for seq, epoch, _, data in reported]
    if rows:
        connection.execute(insert(_table), rows)


def find(
    connection: Connection,
    run_id: str,
    *,
    step: int | None = None,
    row: int | None = None,
    kind: str | None = None,
    mark: Mark | None = None,
    order: Order = "newest",
    limit: int = 20,
    offset: int = 0,
) -> tuple[list[SampleRow], int]:
    """One page of those that fit, and how many fit."""
    query = select(_table).where(_table.c.run_id == run_id)
    if step is not None:
        query = query.where(_table.c.step == step)
    if row is not None:
        query = query.where(_table.c.row == row)
    if kind is not None:
        query = query.where(_table.c.kind == kind)
    if mark is not None:
        query = query.where(_table.c[mark])
    if order in ("best", "worst"):
        query = query.where(_table.c.reward.is_not(None))
    if order == "disagreeing":
        query = query.where(_table.c.spread > 0)
    count = connection.execute(select(func.count()).select_from(query.subquery())).scalar() or 0
    orderings: dict[Order, list[Any]] = {
        "newest": [_table.c.seq.desc()],
        "oldest": [_table.c.seq],
        "best": [_table.c.reward.desc(), _table.c.seq.desc()],
        "worst": [_table.c.reward, _table.c.seq.desc()],
        "disagreeing": [_table.c.spread.desc(), _table.c.seq.desc()],
    }
    rows = connection.execute(query.order_by(*orderings[order]).limit(limit).offset(offset))
    return [_row(row) for row in rows], int(count)


def steps(connection: Connection, run_id: str) -> list[tuple[int, int]]:
    """Each step with samples, and how many it has."""
    query = select(_table.c.step, func.count()).where(_table.c.run_id == run_id)
    rows = connection.execute(query.group_by(_table.c.step).order_by(_table.c.step)).all()
    return [(int(row[0]), int(row[1])) for row in rows]


def read(connection: Connection, run_id: str, seqs: Sequence[int]) -> dict[int, Event]:
    """The sample events themselves, by seq."""
    table = schema.events
    rows = connection.execute(
        select(table).where(table.c.run_id == run_id, table.c.seq.in_(list(seqs)), table.c.kind == "sample")
    )
    return {
        row.seq: Event(
            run_id=row.run_id, seq=row.seq, time=row.time, kind=EventKind.SAMPLE, epoch=row.epoch, data=row.data
        )
        for row in rows
    }


def _facts(data: Any) -> dict[str, Any]:
    kind = data.get("kind")
    reward = _number(data.get("adapter_reward" if kind == "eval" else "reward"))
    rewards = data.get("rewards")
    numbers = [_number(each) for each in rewards] if isinstance(rewards, list) else []
    if kind == "eval":
        numbers = [_number(data.get("base_reward")), reward]
    known = [each for each in numbers if each is not None]
    return {
        "step": _integer(data.get("step")) or 0,
        "kind": kind if isinstance(kind, str) and len(kind) <= 16 else "other",
        "row": _integer(data.get("row")),
        "reward": reward,
        "spread": max(known) - min(known) if len(known) > 1 else None,
        "truncated": data.get("truncated") is True,
        "failed": data.get("success") is False or bool(data.get("error")),
    }


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _row(row: Any) -> SampleRow:
    return SampleRow(
        seq=row.seq,
        epoch=row.epoch,
        step=row.step,
        kind=row.kind,
        row=row.row,
        reward=row.reward,
        spread=row.spread,
        truncated=row.truncated,
        failed=row.failed,
    )
