"""Our side of `sft_cpu`: the trainer's own `training.sft.train` over a real environment folder.

Reads a job (JSON on stdin), prints one JSON line.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.environments.loading import LocalEnvironment
from flash.inference.lanes import share_cpus
from flash.inference.loading import load_base
from flash.training import sft
from flash.training.reporter import RecordingReporter


class Clock(RecordingReporter):
    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.ends.append(time.perf_counter())


def main() -> None:
    job = json.load(sys.stdin)
    config, _ = parse_config({
        "model": "flash/nano",
        "environment": {"id": "local/bench"},
        "train": {
            "lora_rank": job["lora_rank"], "lora_alpha": job["lora_alpha"], "batch_size": job["batch_size"],
            "max_length": job["max_length"], "learning_rate": job["learning_rate"], "epochs": 1000,
            "max_steps": job["warmup_steps"] + job["steps"], "save_every": 1_000_000,
        },
    })
    base = load_base(Path(job["model"]))
    base = dataclasses.replace(base, lanes=share_cpus(base.model, job["threads"]))  # as the trainer does
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        environment = LocalEnvironment(Path(job["environment"]), {}, Path(folder) / "env")
        sft.train(resolve(config, seed=0), base, environment, clock, work_dir=Path(folder))
    seconds = clock.ends[-1] - clock.ends[job["warmup_steps"] - 1]
    print(json.dumps({
        "rows_per_s": job["steps"] * job["batch_size"] / seconds,
        "seconds_per_step": seconds / job["steps"],
        "settings": "the recipe's defaults",
    }))


if __name__ == "__main__":
    main()
