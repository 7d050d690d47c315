"""Our side of `grpo_cpu`: `training.grpo.train` as a run calls it, with an environment that costs nothing.

Reads a job (JSON on stdin), prints one JSON line.
"""

import json
import sys
import tempfile
from pathlib import Path

from flash_side import Clock, Questions, loaded, spec_of

from flash.training import grpo


def main() -> None:
    job = json.load(sys.stdin)
    train = {
        "lora_rank": job["lora_rank"], "lora_alpha": job["lora_alpha"], "learning_rate": job["learning_rate"],
        "batch_size": job["prompts"], "group_size": job["group_size"], "max_tokens": job["max_tokens"],
        "steps": job["warmup_steps"] + job["steps"],
    }  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(train, algorithm="grpo")
        grpo.train(spec, loaded(job, endless=True), Questions(job["inputs"]), clock, work_dir=Path(folder))
    seconds = clock.ends[-1] - clock.ends[job["warmup_steps"] - 1]
    print(json.dumps({"seconds_per_step": seconds / job["steps"], "settings": "the recipe's defaults"}))


if __name__ == "__main__":
    main()
