"""The short form of every row of the reliability table; `make torture` runs the long ones."""

from __future__ import annotations

import pytest
from torture.rows import ROWS
from torture.tally import Row, Tally, table

QUICK = ("archives",)  # cheap enough for every run of the tests


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.key, marks=() if row.key in QUICK else pytest.mark.slow) for row in ROWS]
)
@pytest.mark.timeout(300)
def test_it_survives(row: Row):
    tally = row.run(row.short, 1)
    assert tally.losses == []
    assert tally.injected >= row.short * 0.8
    assert tally.lost == 0


def test_a_loss_is_counted_and_shown():
    tally = Tally()
    tally.count(True)
    tally.count(False, "gone")
    assert (tally.injected, tally.lost, tally.losses) == (2, 1, ["gone"])
    assert "| 2 | 1 | 1 |" in table([(ROWS[0], tally, 1.0)])
