"""SFT on `flash/nano`, CPU, fp32: rows a second, Flash beside TRL's SFTTrainer.

Both sides train the same tokens with the same LoRA, batch, optimiser and threads, each in its own process and
environment, in alternating pairs. One command: `python benchmarks/run.py sft_cpu`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Spread, ensure_peers, run_side, write_result

import flash.catalog
from flash.environments.loading import LocalEnvironment
from flash.inference.chat import ChatRenderer
from flash.inference.loading import load_base

NANO = Path(flash.catalog.__file__).parent / "nano"
ENVIRONMENT = ROOT.parent / "examples" / "arithmetic"
PAIRS = 7
JOB: dict[str, Any] = {
    "model": str(NANO), "environment": str(ENVIRONMENT), "threads": 2, "lora_rank": 32, "lora_alpha": 64,
    "batch_size": 32, "max_length": 256, "learning_rate": 1e-3, "warmup_steps": 5, "steps": 40,
}


def rendered_rows() -> list[dict[str, list[int]]]:
    """Every training row as our renderer makes it, in the form that TRL takes pre-tokenised."""
    renderer = ChatRenderer(load_base(NANO).tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        environment = LocalEnvironment(ENVIRONMENT, {}, Path(folder))
        found = environment.rows()
        targets = environment.targets(found.split, range(found.count))
    rendered = [renderer.render_target(target.prompt, target.completion) for target in targets]
    return [
        {"input_ids": list(row.tokens), "completion_mask": [int(trained) for trained in row.trained]}
        for row in rendered
    ]


def main() -> None:
    peers = ensure_peers()
    rows = rendered_rows()
    ours, theirs = [], []
    for _ in range(PAIRS):
        ours.append(run_side(sys.executable, "flash_sft.py", JOB))
        theirs.append(run_side(peers, "trl_sft.py", {**JOB, "rows": rows}))
        print(f"  rows/s: flash {ours[-1]['rows_per_s']:.0f}, trl {theirs[-1]['rows_per_s']:.0f}", file=sys.stderr)
    ratio = Spread.of([a["rows_per_s"] / b["rows_per_s"] for a, b in zip(ours, theirs, strict=True)])
    flash_rows, trl_rows = (Spread.of([run["rows_per_s"] for run in side]) for side in (ours, theirs))
    shown = {key: value for key, value in JOB.items() if key not in ("model", "environment")}
    shown |= {"model": "flash/nano", "environment": "examples/arithmetic", "rows": len(rows), "precision": "fp32"}
    path = write_result("sft_cpu", {
        "job": shown, "pairs": PAIRS,
        "flash": {"rows_per_s": vars(flash_rows), "settings": ours[0]["settings"]},
        "trl": {"rows_per_s": vars(trl_rows), "settings": theirs[0]["settings"]},
        "ratio": vars(ratio),
    })
    print("SFT on flash/nano, CPU fp32, " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    print(f"  flash   {flash_rows} rows/s   settings: {ours[0]['settings']}")
    print(f"  trl     {trl_rows} rows/s   settings: {theirs[0]['settings']}")
    print(f"  ratio   {ratio}   (flash / trl, over {PAIRS} pairs; goal 2)")
    print(f"  written to {path.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    main()
