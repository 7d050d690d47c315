"""Long runs, read in little: metrics in blocks, samples by index."""

from __future__ import annotations

import math
import time

import pytest
from sqlalchemy import Connection

from flash.records import EventKind
from flash.storage import events, samples, series
from flash.storage.database import Database
from flash.storage.events import NewEvent
from flash.storage.runs import NewRun, insert_run

RUN = "flash-1-00000001"


@pytest.fixture
def connection(database: Database):
    with database.write() as opened:
        insert_run(opened, NewRun("local", {}, {}, 0, "local", "env", "0" * 64), now=1.0, run_id=RUN)
        yield opened


def report(connection: Connection, steps: range, *, epoch: int = 1, batch: int = 50, offset: float = 0.0) -> None:
    told = [
        NewEvent(EventKind.METRICS, {"step": step, "values": {"loss": step + offset, "rate": 0.5}}, float(step), epoch)
        for step in steps
    ]
    for begin in range(0, len(told), batch):
        events.append(connection, RUN, told[begin : begin + batch], now=1.0)


def test_a_short_run_is_read_event_by_event(connection: Connection):
    report(connection, range(1, 101))
    found = series.read(connection, RUN, points=300)
    assert [span.first_step for span in found.spans] == list(range(1, 101))
    assert found.spans[41].values["loss"] == [1, 42.0, 42.0, 42.0]
    assert (found.events, found.last_step) == (100, 100)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_a_long_run_is_read_in_spans_that_lose_no_extreme(connection: Connection, batch: int):
    report(connection, range(1, 3001), batch=batch)
    lowest = NewEvent(EventKind.METRICS, {"step": 3001, "values": {"loss": -9}}, 1.0, 1)
    events.append(connection, RUN, [lowest], now=1.0)
    found = series.read(connection, RUN, points=20)
    assert len(found.spans) <= 20
    assert sum(span.events for span in found.spans) == 3001
    assert found.spans[0].first_step == 1
    assert min(span.values["loss"][2] for span in found.spans) == -9
    assert max(span.values["loss"][3] for span in found.spans) == 3000
    total = sum(span.values["loss"][1] for span in found.spans)
    assert total == pytest.approx(3000 * 3001 / 2 - 9)


def test_a_part_of_a_long_run_is_read_closely(connection: Connection):
    report(connection, range(1, 3001))
    found = series.read(connection, RUN, points=100, first=1500, last=1560)
    assert [span.first_step for span in found.spans] == list(range(1500, 1561))
    assert (found.events, found.last_step) == (3000, 3000)


def test_what_a_later_attempt_did_again_counts_once(connection: Connection):
    report(connection, range(1, 131))
    report(connection, range(101, 201), epoch=2, offset=0.25)
    found = series.read(connection, RUN, points=300)
    assert [span.first_step for span in found.spans] == list(range(1, 201))
    assert found.spans[99].values["loss"][1] == 100.0
    assert found.spans[100].values["loss"][1] == 101.25


def test_odd_metrics_are_passed_over(connection: Connection):
    odd = [
        {"step": "1", "values": {"loss": 1.0}},
        {"step": 2, "values": None},
        {"step": 3, "values": {"loss": "high", "flag": True, "nan": math.nan, "big": 10**400, "fine": 2}},
        {"values": {}},
    ]
    events.append(connection, RUN, [NewEvent(EventKind.METRICS, data, 1.0, 1) for data in odd], now=1.0)
    found = series.read(connection, RUN, points=10)
    assert [span.values for span in found.spans] == [{"fine": [1, 2.0, 2.0, 2.0]}]


def test_a_hundred_thousand_steps_are_read_at_once(connection: Connection):
    report(connection, range(1, 100_001), batch=5000)
    began = time.perf_counter()
    found = series.read(connection, RUN, points=300)
    took = time.perf_counter() - began
    assert len(found.spans) <= 300
    assert took < 2.0  # a tenth of this on an idle machine; a scan of the events takes several times as long


def test_sparks_show_a_runs_course(connection: Connection):
    report(connection, range(1, 2001))
    spark = series.sparks(connection, {RUN: "loss"}, points=20)[RUN]
    assert 10 <= len(spark) <= 40
    assert spark == sorted(spark)
    assert series.sparks(connection, {RUN: "absent"}, points=20) == {RUN: []}
    assert series.sparks(connection, {}, points=20) == {}


def rollout(step: int, reward: float, rewards: list[float], **more: object) -> NewEvent:
    data = {"step": step, "kind": "rollout", "row": step % 3, "reward": reward, "rewards": rewards, **more}
    return NewEvent(EventKind.SAMPLE, data, 1.0, 1)


def test_samples_are_found_by_what_is_said_of_them(connection: Connection):
    told = [
        rollout(1, 0.0, [0.0, 0.0]),
        rollout(1, 1.0, [0.0, 1.0], truncated=True),
        rollout(2, 0.5, [0.25, 0.5], success=False),
        NewEvent(EventKind.SAMPLE, {"step": 2, "kind": "eval", "base_reward": 0.0, "adapter_reward": 2.0}, 1.0, 1),
        NewEvent(EventKind.SAMPLE, {"step": None, "kind": ["odd"], "reward": "high", "rewards": 3}, 1.0, 1),
    ]
    last = events.append(connection, RUN, told, now=1.0)
    first = last - len(told) + 1

    def found(**asked: object) -> list[int]:
        rows, count = samples.find(connection, RUN, **asked)  # type: ignore[arg-type]
        assert count == len(rows)
        return [row.seq - first for row in rows]

    assert found() == [4, 3, 2, 1, 0]
    assert found(order="best") == [3, 1, 2, 0]
    assert found(order="worst", kind="rollout") == [0, 2, 1]
    assert found(order="disagreeing") == [3, 1, 2]
    assert found(mark="truncated") == [1]
    assert found(mark="failed") == [2]
    assert found(step=2) == [3, 2]
    assert found(row=1) == [1, 0]
    rows, count = samples.find(connection, RUN, limit=2, offset=1)
    assert ([row.seq - first for row in rows], count) == ([3, 2], 5)
    assert samples.steps(connection, RUN) == [(0, 1), (1, 2), (2, 2)]
    assert samples.read(connection, RUN, [first + 1])[first + 1].data["reward"] == 1.0
