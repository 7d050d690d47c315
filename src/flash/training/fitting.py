"""What a step does when memory runs out: less at a time, and the same step again.

Owns the size of micro-batches, and when layers are computed twice. Neither changes a gradient beyond rounding, so a
run may go on; its record says that it did. Knows no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar

from flash.config.run import Recipe
from flash.errors import OutOfMemory
from flash.inference.memory import first_line, is_out_of_memory, release
from flash.training.policy import Policy

T = TypeVar("T")
Warn = Callable[[str, str], None]  # a code, a text


class Reduced(TypedDict):
    """What a checkpoint keeps of a run's retreat."""

    tokens: int
    recompute: bool


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
    """How many tokens, padding included, go through the model at once; and whether it computes its layers twice."""

    def __init__(self, tokens: int, *, policy: Policy | None = None, warn: Warn = quiet) -> None:
        """`policy` computes its layers twice when a row alone does not fit."""
        self.tokens = max(1, tokens)
        self._policy = policy
        self._warn = warn

    @classmethod
    def planned(
        cls, recipe: Recipe, policy: Policy, *, divisor: int, before: Reduced | None, warn: Warn
    ) -> MicroBatches:
        """The recipe's, divided for an attempt after one that ran out of memory; `before` is what a resumed run had
        come down to."""
        tokens = recipe.micro_batch_tokens // divisor
        if before is not None:
            tokens = min(tokens, before["tokens"])
            if before["recompute"]:
                policy.recompute()
        return cls(tokens, policy=policy, warn=warn)

    @property
    def reduced(self) -> Reduced:
        """What a resumed run must know to go on the same."""
        return {"tokens": self.tokens, "recompute": self._policy is not None and self._policy.recomputes}

    def fitting(self, work: Callable[[], T], lengths: Sequence[int], *, what: str) -> T:
        """`work()`, which splits rows of these `lengths` by `tokens`; with less for good when memory runs out."""
        longest = max(lengths, default=1)

        def shrink() -> str | None:
            at_most = min(self.tokens, longest * len(lengths))  # what the largest one can really have held
            if at_most > longest:
                self.tokens = max(longest, at_most // 2)
                return f"going on with micro-batches of {self.tokens} tokens at most, from {at_most}"
            if self._policy is None or self._policy.recomputes:
                return None
            self._policy.recompute()
            return "going on with each layer computed again in the backward pass, which is slower"

        return with_less(work, what=what, shrink=shrink, warn=self._warn)
