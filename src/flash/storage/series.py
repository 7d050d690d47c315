"""Metrics over steps, small enough to draw: whatever a run's length, so many points.

Owns the blocks: each sums up to `BLOCK` metrics events in a row of one attempt, and is kept as the events come in,
so that a run of a hundred thousand steps is read without its hundred thousand events. Knows nothing of charts.
Where an attempt went on from a checkpoint, what the earlier one had reported beyond it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from flash.storage import schema

BLOCK = 64  # metrics events
Reported = tuple[int, int | None, float, Mapping[str, Any]]  # seq, epoch, time, data
_table = schema.metric_blocks


@dataclass
class Span:
    """Consecutive metrics events in sum. `values` by name: [count, sum, lowest, highest]."""

    epoch: int | None
    first_seq: int
    last_seq: int
    first_step: int
    last_step: int
    last_time: float
    events: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, seq: int, epoch: int | None, time: float, step: int, values: Mapping[str, float]) -> Span:
        summed = {name: [1, value, value, value] for name, value in values.items()}
        return cls(epoch, seq, seq, step, step, time, 1, summed)

    def add(self, other: Span) -> None:
        """Takes in what follows."""
        self.last_seq = other.last_seq
        self.first_step = min(self.first_step, other.first_step)
        self.last_step = max(self.last_step, other.last_step)
        self.last_time = other.last_time
        self.events += other.events
        for name, (count, total, low, high) in other.values.items():
            mine = self.values.get(name)
            if mine is None:
                self.values[name] = [count, total, low, high]
            else:
                mine[0] += count
                mine[1] += total
                mine[2] = min(mine[2], low)
                mine[3] = max(mine[3], high)


@dataclass(frozen=True)
class Series:
    """`spans` in the order of steps; `last_step` of the whole run, whatever was asked for."""

    spans: list[Span]
    events: int  # of the whole run
    last_step: int


def fold(connection: Connection, run_id: str, reported: Sequence[Reported]) -> None:
    """Adds metrics events to the run's blocks. `data` comes from a worker: what is no number is passed over."""
    found = [span for span in map(_span, reported) if span is not None]
    if not found:
        return
    row = connection.execute(
        select(_table).where(_table.c.run_id == run_id).order_by(_table.c.position.desc()).limit(1)
    ).first()
    position = -1 if row is None else int(row.position)
    begun = None if row is None else _of_row(row)
    if begun is not None and _takes(begun, found[0]):
        while found and _takes(begun, found[0]):
            begun.add(found.pop(0))
        same = (_table.c.run_id == run_id) & (_table.c.position == position)
        connection.execute(update(_table).where(same).values(**_values(begun)))
    fresh: list[Span] = []
    for span in found:
        if fresh and _takes(fresh[-1], span):
            fresh[-1].add(span)
        else:
            fresh.append(span)
    if fresh:
        connection.execute(
            insert(_table),
            [
                {"run_id": run_id, "position": position + 1 + offset, **_values(span)}
                for offset, span in enumerate(fresh)
            ],
        )


def read(
    connection: Connection, run_id: str, *, points: int, first: int | None = None, last: int | None = None
) -> Series:
    """At most about `points` spans that cover the steps `first` to `last`: the events themselves where they are few."""
    whole = connection.execute(
        select(func.sum(_table.c.events), func.max(_table.c.last_step)).where(_table.c.run_id == run_id)
    ).one()
    query = select(_table).where(_table.c.run_id == run_id)
    if first is not None:
        query = query.where(_table.c.last_step >= first)
    if last is not None:
        query = query.where(_table.c.first_step <= last)
    blocks = [_of_row(row) for row in connection.execute(query.order_by(_table.c.position))]
    spans = _current(connection, run_id, blocks)
    if sum(span.events for span in spans) <= 2 * points or len(spans) <= points // 8:
        spans = [each for span in spans for each in _each(connection, run_id, span)]
        spans = [
            span
            for span in spans
            if (first is None or span.last_step >= first) and (last is None or span.first_step <= last)
        ]
    return Series(thinned(spans, points), int(whole[0] or 0), int(whole[1] or 0))


def sparks(connection: Connection, names: Mapping[str, str], *, points: int) -> dict[str, list[float]]:
    """About `points` means of one metric for each run, by `names[run_id]`: its course at a glance."""
    if not names:
        return {}
    counted = connection.execute(
        select(_table.c.run_id, func.count(), func.min(_table.c.first_seq), func.max(_table.c.last_seq))
        .where(_table.c.run_id.in_(list(names)))
        .group_by(_table.c.run_id)
    ).all()
    found: dict[str, list[float]] = {}
    for run_id, blocks, first_seq, last_seq in counted:
        if blocks * 4 < points:  # a short run: its events
            spans = _events(connection, run_id, first_seq, last_seq)
        else:
            every = max(1, blocks // points)
            query = select(_table).where(_table.c.run_id == run_id, _table.c.position % every == 0)
            spans = [_of_row(row) for row in connection.execute(query.order_by(_table.c.position))]
        name = names[run_id]
        thin = thinned([span for span in spans if name in span.values], points)
        found[run_id] = [span.values[name][1] / span.values[name][0] for span in thin]
    return found


def thinned(spans: Sequence[Span], points: int) -> list[Span]:
    """Neighbours of one attempt joined until no more than about `points` are left."""
    every = math.ceil(len(spans) / max(1, points))
    if every <= 1:
        return list(spans)
    joined: list[Span] = []
    members = 0
    for span in spans:
        if joined and members < every and joined[-1].epoch == span.epoch:
            joined[-1].add(span)
            members += 1
        else:
            joined.append(_copy(span))
            members = 1
    return joined


def _current(connection: Connection, run_id: str, blocks: Iterable[Span]) -> list[Span]:
    """The blocks without what a later attempt did again."""
    kept: list[Span] = []
    limit: float = math.inf  # first step of what came after
    later: Span | None = None
    for block in reversed(list(blocks)):
        if later is not None and block.epoch != later.epoch:
            limit = min(limit, later.first_step)
        later = block
        if block.last_step < limit:
            kept.append(block)
        elif block.first_step < limit:
            inside = [span for span in _each(connection, run_id, block) if span.last_step < limit]
            kept.extend(reversed(inside))
    return kept[::-1]


def _each(connection: Connection, run_id: str, span: Span) -> list[Span]:
    """The events that a span sums up, one by one."""
    return [span] if span.events == 1 else _events(connection, run_id, span.first_seq, span.last_seq)


def _events(connection: Connection, run_id: str, first_seq: int, last_seq: int) -> list[Span]:
    table = schema.events
    rows = connection.execute(
        select(table.c.seq, table.c.epoch, table.c.time, table.c.data)
        .where(table.c.run_id == run_id, table.c.seq.between(first_seq, last_seq), table.c.kind == "metrics")
        .order_by(table.c.seq)
    )
    return [span for span in (_span((row.seq, row.epoch, row.time, row.data)) for row in rows) if span is not None]


def _span(reported: Reported) -> Span | None:
    seq, epoch, time, data = reported
    step, values = data.get("step"), data.get("values")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53 or not isinstance(values, dict):
        return None
    numbers = {str(name): float(value) for name, value in values.items() if _number(value)}
    return Span.of(seq, epoch, time, step, numbers)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # NaN and infinity fail this too; sums stay finite


def _takes(block: Span, span: Span) -> bool:
    return block.events < BLOCK and block.epoch == span.epoch and span.first_step >= block.first_step


def _values(span: Span) -> dict[str, Any]:
    return {
        "epoch": span.epoch,
        "events": span.events,
        "first_seq": span.first_seq,
        "last_seq": span.last_seq,
        "first_step": span.first_step,
        "last_step": span.last_step,
        "last_time": span.last_time,
        "sums": span.values,
    }


def _of_row(row: Any) -> Span:
    return Span(
        epoch=row.epoch,
        first_seq=row.first_seq,
        last_seq=row.last_seq,
        first_step=row.first_step,
        last_step=row.last_step,
        last_time=row.last_time,
        events=row.events,
        values=row.sums,
    )


def _copy(span: Span) -> Span:
    return replace(span, values={name: list(four) for name, four in span.values.items()})
