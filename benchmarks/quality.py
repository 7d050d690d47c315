"""Quality per compute on three of `examples/`: how soon Flash is where TRL gets at best, and how much lies under the
curve of score over time.

The same rows, reward, LoRA, optimiser, batch and threads on both sides, three seeds, alternating. First with one
learning rate for both; then each side with the better of two, found on the first seed. The score is the step's mean
reward (GRPO), or minus its mean loss on rows not seen before (SFT), averaged over five steps; time counts from the end
of the first step (`waits` measures how soon that is). SFT, whose rate falls, has the same steps on both sides; GRPO the
same time, which is what TRL takes for its steps. One command, an hour: `python benchmarks/run.py quality`;
`FLASH_QUALITY_SEEDS=1` is a third of it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Spread, ensure_peers, run_side, write_result
from benchmarks.sft_cpu import rendered_rows

import flash.catalog

NANO = Path(flash.catalog.__file__).parent / "nano"
EXAMPLES = ROOT.parent / "examples"
SEEDS = range(int(os.environ.get("FLASH_QUALITY_SEEDS", "3")))
SHARES = (0.5, 0.75, 0.9)
WINDOW = 5  # steps
LORA = {"lora_rank": 32, "lora_alpha": 64}
TASKS: dict[str, dict[str, Any]] = {
    "arithmetic, SFT": {
        "example": "arithmetic", "algorithm": "sft", "steps": 80, "schedule": "linear", "warmup": 3,
        "rates": (1e-3, 2e-3), "train": {**LORA, "batch_size": 32, "max_length": 256},
    },
    "arithmetic, GRPO": {
        "example": "arithmetic", "algorithm": "grpo", "steps": 100, "schedule": "constant", "warmup": 0,
        "rates": (5e-4, 1e-3), "train": {**LORA, "batch_size": 32, "group_size": 8, "max_tokens": 8},
    },
    "letters-thinking, GRPO": {
        "example": "letters-thinking", "algorithm": "grpo", "steps": 60, "schedule": "constant", "warmup": 0,
        "thinking": True, "rates": (5e-4, 1e-3),
        "train": {**LORA, "batch_size": 32, "group_size": 8, "max_tokens": 40},
    },
}  # fmt: skip

Curve = list[tuple[float, float]]


def job(task: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in (EXAMPLES / task["example"] / "dataset" / "train.jsonl").open()]
    length = {"steps": task["steps"]} if task["algorithm"] == "grpo" else {"epochs": 1000, "max_steps": task["steps"]}
    return {
        **task, "thinking": task.get("thinking", False), "model": str(NANO), "threads": 2, "seed": seed,
        "rows": [{"input": row["input"], "output": row["output"]} for row in rows],
        "tokens": rendered_rows() if task["algorithm"] == "sft" else [],  # so that both losses are of the same tokens
        "environment": str(EXAMPLES / task["example"]),
        "train": {**task["train"], "learning_rate": rate, **length},
    }  # fmt: skip


def smooth(curve: Curve) -> Curve:
    """Trailing means; the time counts from the end of the first step."""
    return [
        (seconds - curve[0][0], statistics.fmean(score for _, score in curve[max(0, i - WINDOW + 1) : i + 1]))
        for i, (seconds, _) in enumerate(curve)
    ]


def reached(curve: Curve, score: float) -> float | None:
    """When; None: not in the steps that it was given, or with the first of them."""
    return next((seconds for seconds, value in curve[1:] if value >= score), None)


def area(curve: Curve, until: float, floor: float) -> float:
    """Under the score, above the floor, from 0 to `until` seconds; after its last step a side keeps its score."""
    points = [point for point in curve if point[0] <= until]
    points.append((until, points[-1][1]))
    return sum((later[0] - here[0]) * (here[1] - floor) for here, later in itertools.pairwise(points))


def compared(ours: Curve, theirs: Curve) -> dict[str, float]:
    """Ratios of ours to theirs: times to shares of the peer's best, and areas over the time that the peer took. Where
    ours did not get counts as that whole time."""
    ours, theirs = smooth(ours), smooth(theirs)
    floor = min(score for _, score in (*ours, *theirs))
    best = max(score for _, score in theirs)
    found: dict[str, float] = {}
    until = theirs[-1][0]
    for share in SHARES:
        goal = theirs[0][1] + share * (best - theirs[0][1])
        found[f"time_to_{100 * share:.0f}"] = (reached(ours, goal) or until) / (reached(theirs, goal) or until)
    found["area"] = area(ours, until, floor) / area(theirs, until, floor)
    return found


def main() -> None:
    peers = ensure_peers()

    def run(task: dict[str, Any], rates: tuple[float, float], seed: int) -> tuple[Curve, Curve]:
        theirs: Curve = run_side(peers, "trl_quality.py", job(task, rates[1], seed))["curve"]
        ours = job(task, rates[0], seed)
        if task["algorithm"] == "grpo":
            ours["train"]["steps"] *= 10  # more than there is time for
            ours["limit_s"] = theirs[-1][0] - theirs[0][0]
        return run_side(sys.executable, "flash_quality.py", ours)["curve"], theirs

    results: dict[str, Any] = {}
    for name, task in TASKS.items():
        low, high = task["rates"]
        equal = [run(task, (low, low), seed) for seed in SEEDS]
        other = run(task, (high, high), SEEDS[0])
        until = max(curve[-1][0] - curve[0][0] for curve in (*equal[0], *other))
        floor = min(score for curve in (*equal[0], *other) for _, score in smooth(curve))
        best = tuple(
            max(((low, equal[0][side]), (high, other[side])), key=lambda tried: area(smooth(tried[1]), until, floor))[0]
            for side in (0, 1)
        )
        pairs = equal if best == (low, low) else [run(task, (best[0], best[1]), seed) for seed in SEEDS]
        results[name] = {
            "equal settings": spreads([compared(*pair) for pair in equal]),
            "each side's best": spreads([compared(*pair) for pair in pairs]),
            "learning rates": {"equal": low, "flash's best": best[0], "trl's best": best[1]},
            "last scores": {
                side: vars(Spread.of([smooth(pair[i])[-1][1] for pair in pairs])) for i, side in enumerate(SIDES)
            },
        }
        print(f"  {name}: {results[name]['equal settings']}", file=sys.stderr)
    path = write_result("quality", {
        "job": {"model": "flash/nano", "threads": 2, "precision": "fp32", **LORA, "seeds": len(SEEDS)},
        "tasks": results,
    })  # fmt: skip
    for name, result in results.items():
        for settings in ("equal settings", "each side's best"):
            shown = ", ".join(f"{what} {Spread(**value)}" for what, value in result[settings].items())
            print(f"{name}, {settings}: {shown}")
    print(f"  written to {path.relative_to(ROOT.parent)}")


SIDES = ("flash", "trl")


def spreads(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Over the seeds."""
    return {what: vars(Spread.of([each[what] for each in found])) for what in found[0]}


if __name__ == "__main__":
    main()
