"""GRPO on `flash/nano`, CPU, fp32: seconds a step, Flash beside TRL's GRPOTrainer.

Both sides sample exactly 32 tokens a completion for 8 prompts x 8 completions from the same prompts, score
them with the same made-up reward, and take one Dr. GRPO step with the same LoRA, optimiser and threads, each in
its own process and environment, in alternating pairs. One command: `python benchmarks/run.py grpo_cpu`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Spread, ensure_peers, run_side, write_result

import flash.catalog

NANO = Path(flash.catalog.__file__).parent / "nano"
ROWS = ROOT.parent / "examples" / "arithmetic" / "dataset" / "train.jsonl"
PAIRS = 7
JOB: dict[str, Any] = {
    "model": str(NANO), "threads": 2, "lora_rank": 32, "lora_alpha": 64, "learning_rate": 1e-4, "prompts": 8,
    "group_size": 8, "max_tokens": 32, "warmup_steps": 3, "steps": 20,
}  # fmt: skip


def main() -> None:
    peers = ensure_peers()
    inputs = [json.loads(line)["input"] for line in ROWS.read_text().splitlines()[:512]]
    ours, theirs = [], []
    for _ in range(PAIRS):
        ours.append(run_side(sys.executable, "flash_grpo.py", {**JOB, "inputs": inputs}))
        theirs.append(run_side(peers, "trl_grpo.py", {**JOB, "inputs": inputs}))
        pair = ours[-1]["seconds_per_step"], theirs[-1]["seconds_per_step"]
        print(f"  s/step: flash {pair[0]:.3f}, trl {pair[1]:.3f}", file=sys.stderr)
    seconds = [[run["seconds_per_step"] for run in side] for side in (ours, theirs)]
    ratio = Spread.of([a / b for a, b in zip(*seconds, strict=True)])
    flash_s, trl_s = (Spread.of(side) for side in seconds)
    shown = {**JOB, "model": "flash/nano", "precision": "fp32"}
    path = write_result("grpo_cpu", {
        "job": shown, "pairs": PAIRS,
        "flash": {"seconds_per_step": vars(flash_s), "settings": ours[0]["settings"]},
        "trl": {"seconds_per_step": vars(trl_s), "settings": theirs[0]["settings"]},
        "ratio": vars(ratio),
    })  # fmt: skip
    print("GRPO on flash/nano, CPU fp32, " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    print(f"  flash   {flash_s} s/step   settings: {ours[0]['settings']}")
    print(f"  trl     {trl_s} s/step   settings: {theirs[0]['settings']}")
    print(f"  ratio   {ratio}   (flash / trl, over {PAIRS} pairs; goal at most 1/4)")
    print(f"  written to {path.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
