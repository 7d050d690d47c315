"""What a row of the table found, and the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


class Unsupported(Exception):
    """This machine can't be made to have such a fault."""


@dataclass
class Tally:
    """Faults injected and what became of them. `losses` says in words what broke a promise, if anything did."""

    injected: int = 0
    survived: int = 0
    losses: list[str] = field(default_factory=list)
    note: str = ""

    def count(self, survived: bool, loss: str = "") -> None:
        self.injected += 1
        self.survived += survived
        if not survived:
            self.losses.append(loss)

    @property
    def lost(self) -> int:
        return self.injected - self.survived


@dataclass(frozen=True)
class Row:
    """One fault of the table: `run(count, seed)` injects it about `count` times, or dies of it."""

    key: str
    name: str
    goal: str
    run: Callable[[int, int], Tally]
    long: int
    short: int


def table(results: list[tuple[Row, Tally, float]]) -> str:
    """The rows in Markdown."""
    lines = ["| fault | goal | injected | survived | lost | seconds |", "|---|---|--:|--:|--:|--:|"]
    for row, tally, seconds in results:
        note = f" ({tally.note})" if tally.note else ""
        counts = f"{tally.injected:,} | {tally.survived:,} | {tally.lost:,} | {seconds:.0f}"
        lines.append(f"| {row.name} | {row.goal}{note} | {counts} |")
    return "\n".join(lines)
