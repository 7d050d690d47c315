"""Independent pieces of work on one model, side by side, each on a core of its own.

A small model's matrix products are too short to share among cores: two cores that split every product gain
little, two that each take half of the rows gain nearly all. So a lane is a Python thread whose products run on
one core; PyTorch lets go of the interpreter while it computes. Owns the threads; knows nothing of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

_MOST_PARAMETERS = 20_000_000  # above, two cores share a matrix product well

T = TypeVar("T")


class Lanes:
    """`count` threads, the caller's own among them. One call at a time; the threads start with the first."""

    def __init__(self, count: int = 1) -> None:
        self.count = max(1, count)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """The pieces' results, in their order, whichever lane took them; raises what a piece raised.

        Grad and inference mode belong to a thread: a piece sets its own.
        """
        if self.count == 1 or len(work) < 2:
            return [piece() for piece in work]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count - 1, "lane", initializer=torch.set_num_threads, initargs=(1,))
        results: list[Any] = [None] * len(work)
        turn = itertools.count()

        def take() -> None:
            while (index := next(turn)) < len(work):
                results[index] = work[index]()

        others = [self._pool.submit(take) for _ in range(min(self.count, len(work)) - 1)]
        try:
            take()
        finally:
            failures = [other.exception() for other in others]  # waits: nothing runs on behind the caller's back
        for failure in failures:
            if failure is not None:
                raise failure
        return results


ONE_LANE = Lanes()


def share_cpus(model: nn.Module, cpus: int) -> Lanes:
    """How `cpus` cores work on this model: as lanes on a small one that lives on the CPU, else together on each
    product. Sets PyTorch's number of threads to suit.

    `flash/nano` on two cores: an update of 64 completions takes 0.25 s on one core, 0.18 s on two that share its
    products (0.4 s if they sleep while they wait), 0.13 s in two lanes.
    """
    small = sum(weight.numel() for weight in model.parameters()) < _MOST_PARAMETERS
    in_lanes = small and next(model.parameters()).device.type == "cpu"
    torch.set_num_threads(1 if in_lanes else cpus)
    return Lanes(cpus) if in_lanes else ONE_LANE


def balanced(weights: Sequence[int], parts: int) -> list[range]:
    """Cuts a sequence into at most `parts` runs, none empty, of about the same total weight."""
    ends = list(itertools.accumulate(weights))
    cuts = [0]
    for part in range(1, parts):
        goal = ends[-1] * part / parts if ends else 0.0
        # the cut nearest to the goal
        cut = min(range(len(ends) + 1), key=lambda place: abs((ends[place - 1] if place else 0) - goal))
        cuts.append(max(cut, cuts[-1]))
    cuts.append(len(ends))
    return [range(start, end) for start, end in itertools.pairwise(cuts) if end > start]
