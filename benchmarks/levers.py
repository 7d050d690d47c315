"""What each of the trainer's levers gives: a step of `flash/nano` without it beside a step with all of them.

CPU, fp32. All levers are measured in turn within one process, with and without in alternation; the scripted chains,
which are decided at the import, in processes of their own. Levers of serving, starting and preparing have benchmarks
that measure both sides anyway. One command: `python benchmarks/run.py levers`, ten minutes on two idle cores.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Spread, run_side, write_result

import flash.catalog

ARITHMETIC = ROOT.parent / "examples" / "arithmetic"
PAIRS = 9
JOB: dict[str, Any] = {
    "model": str(Path(flash.catalog.__file__).parent / "nano"), "threads": 2, "pairs": PAIRS, "steps": 5,
    "environment": str(ARITHMETIC),
    "train": {"lora_rank": 32, "lora_alpha": 64, "learning_rate": 1e-4},
    "works": {
        "SFT": {"batch_size": 32},
        "SFT of mixed lengths": {"batch_size": 32},
        "GRPO": {"batch_size": 8, "group_size": 8, "max_tokens": 32},
        "GRPO of short answers": {"batch_size": 32, "group_size": 8, "max_tokens": 8},
        "GRPO of slow rewards": {"batch_size": 8, "group_size": 8, "max_tokens": 32},
    },
}  # fmt: skip
SCRIPTED = ("SFT", "GRPO")


def main() -> None:
    pairs: dict[str, dict[str, list[float]]] = run_side(sys.executable, "flash_levers.py", JOB)
    pairs = {"scripted chains": _scripted(), **pairs}
    levers = {
        lever: {work: vars(Spread.of(ratios)) for work, ratios in by_work.items()}
        for lever, by_work in pairs.items()
    }
    print("A step of flash/nano, CPU fp32, without each lever: times as long")
    for lever, by_work in levers.items():
        print(f"  {lever}: " + ", ".join(f"{work} {Spread(**spread)}" for work, spread in by_work.items()))
    path = write_result("levers", {
        "job": {"model": "flash/nano", "precision": "fp32", "threads": 2, **JOB["train"], "pairs": PAIRS,
                **{work: ", ".join(f"{key} {value}" for key, value in job.items())
                   for work, job in JOB["works"].items()}},
        "times as long without": levers,
    })  # fmt: skip
    print(f"  written to {path.relative_to(ROOT.parent)}")


def _scripted() -> dict[str, list[float]]:
    """The same steps with functions as scripts, and as the Python that they are."""
    found: dict[str, list[float]] = {work: [] for work in SCRIPTED}
    for _ in range(PAIRS):
        seconds = {}
        for scripts in ("0", "1"):
            os.environ["PYTORCH_JIT"] = scripts  # PyTorch's own switch
            seconds[scripts] = run_side(sys.executable, "flash_levers.py", {**JOB, "only": SCRIPTED})
        del os.environ["PYTORCH_JIT"]
        for work in SCRIPTED:
            found[work].append(seconds["0"][work] / seconds["1"][work])
    return found


if __name__ == "__main__":
    main()
