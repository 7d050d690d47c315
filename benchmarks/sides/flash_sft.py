"""Our side of `sft_cpu`: the trainer's own `training.sft.train` over a real environment folder.

Reads a job (JSON on stdin), prints one JSON line.
"""

import json
import sys
import tempfile
from pathlib import Path

from flash_side import Clock, loaded, spec_of

from flash.environments.loading import LocalEnvironment
from flash.training import sft


def main() -> None:
    job = json.load(sys.stdin)
    kept = ("lora_rank", "lora_alpha", "batch_size", "max_length", "learning_rate")
    train = {name: job[name] for name in kept} | {"epochs": 1000, "max_steps": job["warmup_steps"] + job["steps"]}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        environment = LocalEnvironment(Path(job["environment"]), {}, Path(folder) / "env")
        sft.train(spec_of(train), loaded(job), environment, clock, work_dir=Path(folder))
    seconds = clock.ends[-1] - clock.ends[job["warmup_steps"] - 1]
    print(json.dumps({
        "rows_per_s": job["steps"] * job["batch_size"] / seconds,
        "seconds_per_step": seconds / job["steps"],
        "settings": "the recipe's defaults",
    }))


if __name__ == "__main__":
    main()
