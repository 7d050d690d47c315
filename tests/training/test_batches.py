"""Which rows a step trains on, how they are split, and what stands where in a micro-batch."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash.inference.chat import RenderedTarget
from flash.training.batches import (
    TokenRows,
    batch_indices,
    collate,
    epoch_order,
    fresh_tokens,
    lane_batches,
    micro_batches,
    steps_per_epoch,
)

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(rows=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 99))
def test_an_epoch_is_one_pass_in_its_own_order(rows: int, size: int, seed: int) -> None:
    per_epoch = steps_per_epoch(rows, size)
    epochs = [
        np.concatenate([batch_indices(rows, size, seed=seed, step=e * per_epoch + s) for s in range(1, per_epoch + 1)])
        for e in range(2)
    ]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    again = batch_indices(rows, size, seed=seed, step=1)
    assert list(again) == list(epochs[0][:size])


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [tuple(batch_indices(50, 50, seed=seed, step=step)) for seed in (0, 1) for step in (1, 2)]
    assert len(set(orders)) == 4


@given(lengths=LENGTHS, budget=st.integers(1, 2000), overhead=st.integers(0, 500))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, overhead: int) -> None:
    groups = micro_batches(lengths, token_budget=budget, overhead_tokens=overhead)
    assert sorted(int(i) for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = max(lengths[int(i)] for i in group) * len(group)
        assert len(group) == 1 or padded <= budget


@given(rows=st.integers(0, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_an_epochs_order_is_numpys_permutation(rows: int, seed: int, epoch: int) -> None:
    """So that runs which were begun before go on with the rows that they would have met."""
    expected = np.random.default_rng([seed, epoch]).permutation(rows)
    assert epoch_order.__wrapped__(rows, seed, epoch).tolist() == expected.tolist()


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), overhead=st.integers(0, 60))
def test_no_split_into_runs_of_like_length_is_cheaper(lengths: list[int], overhead: int) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(max(group) * len(group) + overhead for group in groups)

    ordered = sorted(lengths, reverse=True)
    cheapest = None
    for cuts in range(2 ** (len(ordered) - 1)):
        groups, group = [], [ordered[0]]
        for place, length in enumerate(ordered[1:]):
            if cuts >> place & 1:
                groups.append(group)
                group = []
            group.append(length)
        groups.append(group)
        cheapest = min(cost(groups), cheapest if cheapest is not None else cost(groups))
    found = micro_batches(lengths, token_budget=10**6, overhead_tokens=overhead)
    assert cost([[lengths[int(i)] for i in group] for group in found]) == cheapest


def test_each_trained_token_meets_the_state_before_it() -> None:
    batch = collate(
        [[5, 6, 7], [8, 9, 10, 11, 12]],
        [[False, True, True], [True, False, False, True, True]],
        pad_id=0,
        device=torch.device("cpu"),
    )
    assert batch.tokens_B_T.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]  # the last one is nobody's predictor
    assert batch.targets_N.tolist() == [6, 7, 11, 12]  # never a row's first token, never a pad
    assert batch.tokens_B_T.reshape(-1)[batch.predictors_N].tolist() == [5, 6, 10, 11]


@settings(max_examples=30)
@given(rows=st.lists(st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), st.integers(0, 9))))
def test_rows_come_back_from_their_file_as_they_were(rows, tmp_path_factory) -> None:
    targets = [RenderedTarget(tuple(tokens), min(start, len(tokens))) for tokens, start in rows]
    path: Path = tmp_path_factory.mktemp("rows") / "rows.tokens"
    stored = TokenRows.write(path, iter(targets))
    assert [stored[i] for i in range(len(stored))] == targets
    everything = np.arange(len(stored))
    assert stored.trained_tokens(everything) == sum(sum(target.trained[1:]) for target in targets)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_through_a_pass_over_many_rows(tmp_path: Path) -> None:
    count, target = 100_000, RenderedTarget(tuple(range(100)), 60)
    tracemalloc.start()
    TokenRows.write(tmp_path / "rows", (target for _ in range(count)))
    _, writing = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    rows = TokenRows(tmp_path / "rows")
    batch = batch_indices(count, 32, seed=7, step=2)
    assert rows.lengths[batch].sum() == 3200 and rows.trained_tokens(batch) == 40 * 32
    _, opening = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert writing < 1e6  # in all
    assert opening < 6 * count  # bytes: the order of a pass, and little else

    before = mapped_bytes()
    assert all(rows[index] == target for index in range(count))
    assert mapped_bytes() - before < 10e6  # of 40 MB that were read


def mapped_bytes() -> int:
    """Bytes of files that count as this process's memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:")]
    return 1024 * int(line.split()[1])


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12))
@example(rows=[[1, 1, 1], [1, 1], [1, 1, 1, 1], [0, 0], [1, 1, 1]])
def test_what_rows_begin_with_alike_is_computed_once(rows: list[list[int]]) -> None:
    everything = [[True] * len(row) for row in rows]
    alone = [(number, 0) for number in range(len(rows))]
    batch = collate(rows, everything, pad_id=0, device=torch.device("cpu"), openings=alone)
    assert batch.sharing is not None
    openings = [[tuple(row[: end + 1]) for end in range(len(row) - 1)] for row in rows]  # a last token predicts nothing
    length = batch.tokens_B_T.shape[1]
    place = batch.sharing.place_BT.view(-1, length)
    found = {opening: int(place[b, t]) for b, of_row in enumerate(openings) for t, opening in enumerate(of_row)}
    assert sorted(found.values()) == list(range(len(batch.sharing.computed_U)))  # each opening one place, none over
    for b, of_row in enumerate(openings):
        assert [int(place[b, t]) for t in range(len(of_row))] == [found[opening] for opening in of_row]
    for opening, u in found.items():
        b, t = divmod(int(batch.sharing.computed_U[u]), length)
        assert tuple(rows[b][: t + 1]) == opening and t == len(opening) - 1
    in_all = sum(all(opening in of_row for of_row in openings) for opening in found)
    assert sum(fresh_tokens([row[:-1] for row in rows])) == len(found) - in_all  # every lane computes those


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=60), max_size=30), lanes=st.integers(1, 3))
def test_lanes_take_every_row_once_in_runs(rows: list[list[int]], lanes: int) -> None:
    found = lane_batches(rows, lanes=lanes, token_budget=200, overhead_tokens=10, shares_openings=True)
    runs = [sorted(number for batch in lane for number in batch) for lane in found]
    assert [number for run in runs for number in run] == list(range(len(rows))) and len(runs) <= lanes


@pytest.mark.parametrize("opening", [0, 300])
def test_lanes_compute_about_as_much_where_openings_are_shared(opening: int) -> None:
    system = list(range(opening))
    agreeing = [[*system, 1000, *range(40)]] * 24  # one of them is computed
    others = [[*system, 2000 + number, *range(20)] for number in range(24)]

    def computed(shares_openings: bool) -> list[int]:
        rows = [*agreeing, *others]
        lanes = lane_batches(
            rows, lanes=2, token_budget=10**6, overhead_tokens=10**6, shares_openings=shares_openings
        )
        return [len({tuple(rows[n][:end]) for n in lane[0] for end in range(1, len(rows[n]) + 1)}) for lane in lanes]

    assert len(computed(True)) == len(computed(False)) == 2
    assert max(computed(True)) - min(computed(True)) <= 42
    assert max(computed(False)) - min(computed(False)) > 400
