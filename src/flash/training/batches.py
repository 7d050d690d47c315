"""Token rows on disk, and which of them a step trains on, in which micro-batches.

The batch of step s is a pure function of (seed, s): resuming needs no cursor beyond the step. Knows nothing
of models, losses or where rows come from.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flash.inference.chat import RenderedTarget
from flash.inference.lanes import balanced

# What starting another micro-batch costs, in tokens of the same work: the price of less padding.
OVERHEAD_TOKENS = {"cpu": 128, "cuda": 2048}
_MOST_HIDDEN = 1 << 22  # entries (16 MB) of a table that says which positions see which
_LEAST_TOKENS = 128  # fewer are not worth a lane of their own

Ints = npt.NDArray[np.int64]
_TOKEN = np.dtype(np.int32)
_ENTRY = struct.Struct("=qii")  # a row of the index, as _ROW
_ROW = np.dtype([("end", np.int64), ("trained_from", np.int32), ("length", np.int32)])


class TokenRows:
    """Rendered targets in a folder, read a row at a time: memory stays flat however many.

    `tokens` is one flat file of int32; `index` says of each row where it ends, from where on it is trained and how
    long it is, and is mapped. Tokens are read, not mapped: pages that a pass has touched would count as this process's.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError or ValueError where the folder is not what `write` left."""
        self._folder = folder
        self._index = _mapped(folder / "index")
        self._tokens = os.open(folder / "tokens", os.O_RDONLY)
        weakref.finalize(self, os.close, self._tokens)
        total = int(self._index["end"][-1]) if len(self._index) else 0
        if os.fstat(self._tokens).st_size != total * _TOKEN.itemsize:
            raise ValueError(f"{folder} is not whole")
        self.lengths: npt.NDArray[np.int32] = self._index["length"]

    @classmethod
    def write(cls, folder: Path, targets: Iterable[RenderedTarget]) -> TokenRows:
        """Streams the targets into `folder`, which is made where it is not there, and opens it."""
        folder.mkdir(exist_ok=True)
        total = 0
        with (folder / "tokens").open("wb") as tokens, (folder / "index").open("wb") as index:
            for target in targets:
                tokens.write(array("i", target.tokens))
                total += len(target.tokens)
                index.write(_ENTRY.pack(total, target.trained_from, len(target.tokens)))
        return cls(folder)

    def save(self, folder: Path) -> None:
        """Copies everything into a new folder, to be opened later."""
        shutil.copytree(self._folder, folder)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> RenderedTarget:
        end, trained_from, length = self._index[index].item()
        row = os.pread(self._tokens, length * _TOKEN.itemsize, (end - length) * _TOKEN.itemsize)
        return RenderedTarget(tuple(array("i", row)), trained_from)

    def trained_tokens(self, indices: Ints) -> int:
        """How many tokens of these rows are trained; a row's very first token never is."""
        return int((self.lengths[indices] - np.maximum(self._index["trained_from"][indices], 1)).sum())


def _mapped(path: Path) -> npt.NDArray[np.void]:
    if path.stat().st_size == 0:  # nothing can be mapped
        return np.zeros(0, dtype=_ROW)
    return np.asarray(np.memmap(path, dtype=_ROW, mode="r"))


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def batch_indices(rows: int, batch_size: int, *, seed: int, step: int) -> Ints:
    """The rows of optimizer step `step` (from 1). Each epoch is a fresh seeded shuffle; its last batch may
    be short, so that an epoch is exactly one pass."""
    epoch, position = divmod(step - 1, steps_per_epoch(rows, batch_size))
    order = epoch_order(rows, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].astype(np.int64)


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int32]:
    """The rows of one pass in their seeded shuffle, read-only. Kept: drawing a million takes as long as a step.

    The same order as numpy's `permutation` of so many rows, in half its memory.
    """
    order = np.arange(rows, dtype=np.int32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    order.setflags(write=False)
    return order


def micro_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]], *, token_budget: int, overhead_tokens: int
) -> list[Ints]:
    """Splits a batch into micro-batches of rows of like length; returns positions into `lengths`.

    Minimises padded tokens plus `overhead_tokens` for each micro-batch (what starting one costs, in
    tokens), with at most `token_budget` padded tokens in each; a longer row stands alone. Exact, by
    dynamic programming over the rows sorted by length.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    sorted_lengths = np.asarray(lengths)[order]
    count = len(order)
    if not count:
        return []
    padded_whole = int(sorted_lengths[0]) * count
    if padded_whole <= token_budget and padded_whole - int(sorted_lengths.sum()) <= overhead_tokens:
        return [order]  # no split saves what a second one costs
    cost = np.zeros(count + 1)
    start_of = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        starts = np.arange(end)
        padded = sorted_lengths[:end] * (end - starts)  # the first row of a group is its longest
        allowed = (padded <= token_budget) | (starts == end - 1)
        candidates = np.where(allowed, cost[:end] + padded + overhead_tokens, np.inf)
        start_of[end] = int(candidates.argmin())
        cost[end] = candidates[start_of[end]]
    groups: list[Ints] = []
    end = count
    while end > 0:
        start = int(start_of[end])
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def lane_batches(
    rows: Sequence[Sequence[int]], *, lanes: int, token_budget: int, overhead_tokens: int, shares_openings: bool
) -> list[list[list[int]]]:
    """Cuts rows, as they come, into a run for each lane, and every run into micro-batches; numbers into `rows`.

    The runs are about the same work: tokens, and where rows share their openings those that are computed.
    """
    if not rows:
        return []
    lengths = [len(row) for row in rows]
    parts = min(lanes, max(1, sum(lengths) // _LEAST_TOKENS))
    work = fresh_tokens(rows) if parts > 1 and shares_openings else lengths
    return [
        [
            [part[int(place)] for place in places]
            for places in micro_batches(
                lengths[part.start : part.stop], token_budget=token_budget, overhead_tokens=overhead_tokens
            )
        ]
        for part in balanced(work, parts)
    ]


@dataclass(frozen=True)
class Split:
    """Attention in two parts, so that an opening's queries are asked once and never meet what comes after them: the
    P distinct openings by themselves, and every row's own part (C positions) over its whole row (T).

    `openings_P_S` and `own_B_C` say which of the U computed positions is where (an arbitrary one where it is
    padding), `place_U` where each of the U is in both parts' P*S + B*C positions. `hidden_B_1_C_T` is -inf where a
    position does not see another one.
    """

    openings_P_S: Tensor
    own_B_C: Tensor
    hidden_B_1_C_T: Tensor
    place_U: Tensor


@dataclass(frozen=True)
class Sharing:
    """Which positions of a batch need computing: rows that open alike need their opening once.

    `computed_U` are flat positions (into B*T), ascending, without padding and repeated openings; `place_BT`
    tells for each flat position which of the U stands for it (an arbitrary one where it is padding).
    """

    computed_U: Tensor
    place_BT: Tensor
    split: Split | None = None  # None: attention takes whole rows


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded rows and the trained tokens in them.

    `predictors_N` are flat positions (into B*T) of the hidden states that predict `targets_N`.
    """

    tokens_B_T: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    sharing: Sharing | None = None

    def distinct_predictors(self) -> tuple[Tensor, Tensor | None]:
        """`predictors_N`, each shared one once, and which of these predicts each target (None: its own one)."""
        if self.sharing is None:
            return self.predictors_N, None
        places_M, rows_N = self.sharing.place_BT[self.predictors_N].unique(return_inverse=True)
        return self.sharing.computed_U[places_M], rows_N


def collate(
    rows: Sequence[npt.NDArray[np.int32] | Sequence[int]],
    trained: Sequence[npt.NDArray[np.bool_] | Sequence[bool]],
    *,
    pad_id: int,
    device: torch.device,
    openings: Sequence[tuple[int, int]] | None = None,
) -> MicroBatch:
    """Pads on the right: with causal layers what follows a token can't reach it, so no mask is needed. What follows
    a row's last predictor is left out: nothing asks for it.

    With `openings`, what rows begin with alike is found and shared. `openings[b] = (row, length)` says where attention
    may be split: row b begins with the same `length` tokens as `row`, which must come no later and have no earlier
    partner itself; a row without a partner names itself.
    """
    tokens = _padded(rows, pad_id)
    longest = tokens.shape[1]
    chosen = np.zeros(tokens.shape, dtype=np.bool_)
    for number, (row, mask) in enumerate(zip(rows, trained, strict=True)):
        chosen[number, : len(row)] = mask
    chosen[:, 0] = False  # nothing predicts the first token
    row_N, column_N = chosen.nonzero()
    needed = np.maximum(np.where(chosen, np.arange(longest), 0).max(axis=1), 1)  # up to each row's last predictor
    width = int(needed.max())
    return MicroBatch(
        torch.from_numpy(tokens[:, :width]).to(device).contiguous(),
        torch.from_numpy(row_N * width + column_N - 1).to(device),
        torch.from_numpy(tokens[row_N, column_N]).to(device),
        None if openings is None else _sharing(tokens[:, :width], needed, openings, device),
    )


def _sharing(
    tokens_B_T: Ints, lengths: Ints, openings: Sequence[tuple[int, int]], device: torch.device
) -> Sharing:
    openings = [(row, min(length, *lengths[[number, row]].tolist())) for number, (row, length) in enumerate(openings)]
    source_B_T, fresh_B_T = _prefix_tree(tokens_B_T, lengths)
    computed = np.flatnonzero(fresh_B_T)
    rank = np.zeros(source_B_T.size, dtype=np.int64)
    rank[computed] = np.arange(len(computed))
    place_B_T = rank[source_B_T]
    split = _split(lengths, openings, place_B_T, len(computed), device)
    return Sharing(torch.from_numpy(computed).to(device), torch.from_numpy(place_B_T.reshape(-1)).to(device), split)


def fresh_tokens(rows: Sequence[Sequence[int]]) -> list[int]:
    """How many positions of each row no other row stands for: what it costs where rows share their openings. What all
    of them begin with alike is left out: it costs every lane as much, whichever rows are its own."""
    _, fresh_B_T = _prefix_tree(_padded(rows, 0), np.asarray([len(row) for row in rows]))
    fresh: list[int] = fresh_B_T[:, common_opening(rows) :].sum(axis=1).tolist()
    return fresh


def common_opening(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with alike (a template's start, a system prompt)."""
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False)))


def _padded(rows: Sequence[npt.NDArray[np.int32] | Sequence[int]], pad_id: int) -> Ints:
    tokens_B_T = np.full((len(rows), max(len(row) for row in rows)), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        tokens_B_T[number, : len(row)] = row
    return tokens_B_T


def _prefix_tree(tokens_B_T: Ints, lengths: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """For each position the flat one, of whichever row, that stands for all rows with the same tokens up to there;
    and whether that is itself, and no padding. In sorted order a row has its longest known opening in common with the
    row before it."""
    rows, longest = tokens_B_T.shape
    order = np.asarray(sorted(range(rows), key=lambda row: tokens_B_T[row, : lengths[row]].tobytes()))
    tokens, ends, columns = tokens_B_T[order], lengths[order], np.arange(longest)
    alike = (tokens[1:] == tokens[:-1]) & (columns < np.minimum(ends[1:], ends[:-1])[:, None])
    own = np.ones((rows, longest), dtype=np.bool_)
    own[1:] = ~np.logical_and.accumulate(alike, axis=1)
    first = np.maximum.accumulate(np.where(own, np.arange(rows)[:, None], 0), axis=0)
    source_B_T, fresh_B_T = np.empty_like(tokens_B_T), np.empty_like(own)
    source_B_T[order] = order[first] * longest + columns
    fresh_B_T[order] = own & (columns < ends[:, None])
    return source_B_T, fresh_B_T


def _split(
    lengths: Ints, openings: Sequence[tuple[int, int]], place_B_T: Ints, computed: int, device: torch.device
) -> Split | None:
    """None where it is no gain: its table of what is hidden would be large, or own parts are most of the rows."""
    rows, longest = place_B_T.shape
    starts = np.asarray([length for _, length in openings])
    owners = np.asarray(sorted({row for row, _ in openings}))
    own, opening = int((lengths - starts).max()), int(starts.max())
    if rows * own * longest > _MOST_HIDDEN or 4 * opening < own:
        return None
    columns_C, columns_S = np.arange(own), np.arange(opening)
    at_B_C = starts[:, None] + columns_C
    own_B_C = np.take_along_axis(place_B_T, np.minimum(at_B_C, longest - 1), axis=1)
    openings_P_S = place_B_T[owners, :opening]
    place_U = np.zeros(computed, dtype=np.int64)
    theirs_P_S = columns_S < starts[owners, None]
    place_U[openings_P_S[theirs_P_S]] = np.flatnonzero(theirs_P_S)
    theirs_B_C = at_B_C < lengths[:, None]
    place_U[own_B_C[theirs_B_C]] = np.flatnonzero(theirs_B_C) + theirs_P_S.size
    hidden_B_C_T = np.where(np.arange(longest) > at_B_C[:, :, None], np.float32(-np.inf), np.float32(0.0))
    return Split(*(
        torch.from_numpy(part).to(device) for part in (openings_P_S, own_B_C, hidden_B_C_T[:, None], place_U)
    ))  # fmt: skip
