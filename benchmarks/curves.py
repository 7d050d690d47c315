"""How a step's time grows with rank, group size, completion length, and a batch's with its adapters.

`flash/nano` on a CPU, fp32: training through `training.sft` and `training.grpo`, decoding through the serving engine.
All points are measured in turn within one process, so that a machine whose speed drifts treats them alike. One
command: `python benchmarks/run.py curves`, a minute on two idle cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import ROOT, Spread, run_side, write_result

import flash.catalog

CURVES = {
    "rank": (4, 8, 16, 32, 64, 128),
    "group_size": (2, 4, 8, 16),
    "max_tokens": (8, 16, 32, 64),
    "adapters": (1, 2, 4, 8, 16, 32),
}
JOB = {
    "model": str(Path(flash.catalog.__file__).parent / "nano"), "threads": 2, "turns": 3, "lora_rank": 32,
    "inputs": [f"What is {n} + {n + 3}?" for n in range(64)],
    "sft": {"batch_size": 32, "epochs": 10, "max_steps": 4},
    "grpo": {"batch_size": 8, "group_size": 8, "max_tokens": 32, "steps": 3},
    "serving": {"rows": 32, "tokens": 32},
}  # fmt: skip


def main() -> None:
    measured = run_side(sys.executable, "flash_curves.py", {**JOB, "curves": CURVES})
    curves = {
        curve: {at: {"seconds_per_step": vars(Spread.of(seconds))} for at, seconds in points.items()}
        for curve, points in measured.items()
    }
    print("Curves on flash/nano, CPU fp32: milliseconds a step")
    for curve, points in curves.items():
        shown = ", ".join(f"{at}: {1000 * point['seconds_per_step']['median']:.3g}" for at, point in points.items())
        print(f"  by {curve.replace('_', ' ')}: {shown}")
    job = {
        "model": "flash/nano", "precision": "fp32", "threads": 2, "turns": JOB["turns"],
        "rank": f"SFT, {JOB['sft']['batch_size']} rows a step",
        "group size and max tokens": "GRPO, 8 prompts; 8 completions of 32 tokens where the curve does not say",
        "adapters": f"a token of {JOB['serving']['rows']} rows, prompts of 32 tokens included",
    }  # fmt: skip
    path = write_result("curves", {"job": job, "curves": curves})
    print(f"  written to {path.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
