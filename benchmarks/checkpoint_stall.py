"""How much of its time training waits for checkpoints, at the recipes' own pace of saving and behind a slow store.

`flash/nano` on a CPU, where steps are short and waits weigh most. One command, under two minutes on two idle cores:
`python benchmarks/run.py checkpoint_stall`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Spread, run_side, write_result

import flash.catalog

NANO = Path(flash.catalog.__file__).parent / "nano"
ENVIRONMENT = ROOT.parent / "examples" / "arithmetic"
RUNS = 3
GOAL = 0.01  # at the recipe's pace; ten times that pace is shown beside it
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 126, "epochs": 50, "max_examples": 256},  # one save at the recipe's pace, and the final one
    "sft, saving every 10 steps": {"max_steps": 30, "epochs": 50, "max_examples": 256, "save_every": 10},
}


def main() -> None:
    results: dict[str, Any] = {}
    print("Share of training time that waits for checkpoints; flash/nano, CPU fp32, a store of 1 s an object")
    for name, train in JOBS.items():
        job = {
            "algorithm": name.partition(",")[0], "train": train, "model": str(NANO), "environment": str(ENVIRONMENT),
            "threads": 2, "store_s": 1.0,
        }  # fmt: skip
        sides = [run_side(sys.executable, "flash_checkpoints.py", job) for _ in range(RUNS)]
        share = Spread.of([side["waited_s"] / side["seconds"] for side in sides])
        results[name] = {"share": vars(share), "runs": sides, "final_uploaded": all(s["final_uploaded"] for s in sides)}
        last = sides[-1]
        print(
            f"  {name}: {share} of the time{f' (goal {GOAL:g})' if name == 'sft' else ''}; {last['saves']} saves,"
            f" {last['uploaded']} uploaded, the final one {'among them' if last['final_uploaded'] else 'MISSING'}"
        )
    path = write_result("checkpoint_stall", {"goal": GOAL, "results": results})
    print(f"  written to {path.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
