"""The short form of every row of the reliability table; `make torture` runs the long ones."""

from __future__ import annotations

import re

import pytest
from torture.rows import ROWS
from torture.tally import Row, Tally, Trial, Unsupported, table

from torture import disks

QUICK = ("archives",)  # cheap enough for every run of the tests


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.key, marks=() if row.key in QUICK else pytest.mark.slow) for row in ROWS]
)
@pytest.mark.timeout(900)
def test_it_survives(row: Row):
    try:
        tally = row.run(row.short, 1)
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert tally.losses == []
    assert tally.injected >= row.short * 0.8
    assert tally.lost == 0


def test_a_loss_is_counted_and_shown():
    tally = Tally()
    tally.count(True)
    tally.count(False, "gone")
    assert (tally.injected, tally.lost, tally.losses) == (2, 1, ["gone"])
    trial = Trial(7, tally, 60.0, "2026-01-01", "a machine")
    assert "| 4 | 2 | 2 | 7, 7 | 2.0 |" in table([(ROWS[0], [trial, trial])])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "state", "says"), [
    ("artifacts", "failed", "No space left on device"),
    ("work", "failed", "disk is full|No space left on device"),
    ("database", "done", ""),
])  # fmt: skip
def test_a_disk_that_stays_full_is_a_clear_reason_and_never_done(name: str, state: str, says: str):
    try:
        found = disks.stuck(name)
    except Unsupported as reason:
        pytest.skip(str(reason))
    status, (code, told) = found["status"], found["told"]
    assert status["state"] == state, status["summary"]
    if state == "failed":
        assert re.search(says, status["error"]["message"]), status["error"]
        assert any("No space left" in text for text in status["warnings"]) or name == "work"
    else:
        assert (code, told["error"]["message"]) == (503, "the database can't be used now")
