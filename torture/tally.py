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
    counts: dict[str, int] = field(default_factory=dict)  # of what else there was, for the table; these add up
    note: str = ""

    def count(self, survived: bool, loss: str = "") -> None:
        self.injected += 1
        self.survived += survived
        if not survived:
            self.losses.append(loss)

    @property
    def lost(self) -> int:
        return self.injected - self.survived

    @property
    def remark(self) -> str:
        counted = sorted(self.counts.items(), key=lambda each: -each[1])
        return "; ".join(filter(None, [", ".join(f"{count:,} {what}" for what, count in counted), self.note]))


@dataclass(frozen=True)
class Row:
    """One fault of the table: `run(count, seed)` injects it about `count` times, or dies of it."""

    key: str
    name: str
    goal: str
    run: Callable[[int, int], Tally]
    long: int
    short: int


@dataclass(frozen=True)
class Trial:
    """A row that was run once."""

    seed: int
    tally: Tally
    seconds: float
    date: str
    machine: str


def table(results: list[tuple[Row, list[Trial]]]) -> str:
    """The rows in Markdown, each with all of its trials together."""
    lines = ["| fault | goal | injected | survived | lost | seeds | minutes |", "|---|---|--:|--:|--:|---|--:|"]
    for row, trials in results:
        found = together([trial.tally for trial in trials])
        remark = f" ({found.remark})" if found.remark else ""
        seeds = ", ".join(str(trial.seed) for trial in trials)
        minutes = sum(trial.seconds for trial in trials) / 60
        counts = f"{found.injected:,} | {found.survived:,} | {found.lost:,}"
        lines.append(f"| {row.name} | {row.goal}{remark} | {counts} | {seeds} | {minutes:.1f} |")
    trials = [trial for _, some in results for trial in some]
    when = sorted({trial.date for trial in trials})
    where = "; ".join(sorted({trial.machine for trial in trials}))
    return "\n".join([*lines, "", f"{' to '.join(dict.fromkeys([when[0], when[-1]]))}, {where}."])


def together(tallies: list[Tally]) -> Tally:
    """The sum of several; of their notes the last."""
    total = Tally(note=tallies[-1].note)
    for tally in tallies:
        total.injected += tally.injected
        total.survived += tally.survived
        total.losses += tally.losses
        for what, count in tally.counts.items():
            total.counts[what] = total.counts.get(what, 0) + count
    return total
