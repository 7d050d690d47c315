"""What a step does when memory runs out: less at a time, and the same step again.

Owns the size of micro-batches. No split of a batch changes its gradient beyond rounding, so a run may go on with
smaller ones; the run's record says that it did. Knows no model and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from flash.config.run import Recipe
from flash.errors import OutOfMemory
from flash.inference.memory import first_line, is_out_of_memory, release

T = TypeVar("T")
Warn = Callable[[str, str], None]  # a code, a text


def quiet(code: str, text: str) -> None:
    """A `Warn` that tells no one."""


def with_less(work: Callable[[], T], *, what: str, shrink: Callable[[], str | None], warn: Warn) -> T:
    """`work()`, again each time that memory runs out, after `shrink` has made it need less.

    `shrink` says what it did, or None when there is nothing left to do: then this raises OutOfMemory. `work` must
    not have changed anything when it fails.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        release()  # out of the handler, which kept the error's frames alive
        done = shrink()
        if done is None:
            raise OutOfMemory(
                f"{what} does not fit into memory: {reason}", remedy="lower train.max_length or train.lora_rank"
            )
        warn("out_of_memory", f"{what} did not fit into memory; {done}")


class MicroBatches:
    """How many tokens, padding included, go through the model at once."""

    def __init__(self, tokens: int, *, warn: Warn = quiet) -> None:
        self.tokens = max(1, tokens)
        self._warn = warn

    @classmethod
    def planned(cls, recipe: Recipe, *, divisor: int, before: int | None, warn: Warn) -> MicroBatches:
        """The recipe's, divided for an attempt after one that ran out of memory; `before` is what a resumed run had
        come down to."""
        tokens = recipe.micro_batch_tokens // divisor
        return cls(tokens if before is None else min(tokens, before), warn=warn)

    def fitting(self, work: Callable[[], T], lengths: Sequence[int], *, what: str) -> T:
        """`work()`, which splits rows of these `lengths` by `tokens`; halved for good when memory runs out."""
        longest = max(lengths, default=1)

        def shrink() -> str | None:
            at_most = min(self.tokens, longest * len(lengths))  # what the largest one can really have held
            if at_most <= longest:
                return None
            self.tokens = max(longest, at_most // 2)
            return f"going on with micro-batches of {self.tokens} tokens at most, from {at_most}"

        return with_less(work, what=what, shrink=shrink, warn=self._warn)
