"""Work side by side: results in order, failures raised, and the same bits whatever the number of lanes."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.inference.lanes import Lanes, balanced


def test_results_come_in_the_order_of_the_work_whoever_finishes_first() -> None:
    second_is_done = threading.Event()

    def slow() -> str:
        assert second_is_done.wait(30)  # only another lane can let this one end
        return "slow"

    def fast() -> str:
        second_is_done.set()
        return "fast"

    assert Lanes(2).run([slow, fast]) == ["slow", "fast"]


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_failure_is_raised_after_the_others_are_through(lanes: int) -> None:
    done: list[int] = []

    def piece(number: int) -> int:
        if number == 1:
            raise ValueError("piece 1")
        done.append(number)
        return number

    pool = Lanes(lanes)
    with pytest.raises(ValueError, match="piece 1"):
        pool.run([lambda number=number: piece(number) for number in range(6)])
    settled = len(done)
    assert pool.run([lambda: 7, lambda: 8]) == [7, 8]  # it goes on serving
    assert len(done) == settled  # nothing was still running


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_a_cut_keeps_order_and_balance(weights: list[int], parts: int) -> None:
    runs = balanced(weights, parts)
    assert [place for run in runs for place in run] == list(range(len(weights)))
    assert len(runs) <= parts
    assert all(len(run) for run in runs)
    for run in runs:
        assert sum(weights[i] for i in run) <= sum(weights) / parts + max(weights)
