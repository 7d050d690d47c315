"""A long run's pace and memory for `growth`: does the last tenth of its steps go as the first one did?

Reads a job (JSON on stdin), prints one JSON line.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.environments.loading import LocalEnvironment
from flash.inference.lanes import share_cpus
from flash.inference.loading import load_base
from flash.training import sft
from flash.training.reporter import RecordingReporter


class Clock(RecordingReporter):
    """Times and memory instead of reports."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []
        self.resident: list[int] = []
        self._process = psutil.Process()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.ends.append(time.perf_counter())
            self.resident.append(self._process.memory_info().rss)


def main() -> None:
    job = json.load(sys.stdin)
    config, _ = parse_config({
        "model": "flash/nano",
        "environment": {"id": "local/bench"},
        "train": {
            "lora_rank": job["lora_rank"], "lora_alpha": job["lora_alpha"], "batch_size": job["batch_size"],
            "max_length": job["max_length"], "learning_rate": job["learning_rate"], "epochs": 1000,
            "max_steps": job["steps"], "save_every": 1_000_000,
        },
    })  # fmt: skip
    base = load_base(Path(job["model"]))
    base = dataclasses.replace(base, lanes=share_cpus(base.model, job["threads"]))  # as the trainer does
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        environment = LocalEnvironment(Path(job["environment"]), {}, Path(folder) / "env")
        sft.train(resolve(config, seed=0), base, environment, clock, work_dir=Path(folder))
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    tenth = len(seconds) // 10
    first, last = seconds[tenth : 2 * tenth], seconds[-tenth:]  # the very first tenth warms up
    print(json.dumps({
        "slower": statistics.median(last) / statistics.median(first),
        "seconds_per_step": statistics.median(seconds),
        "grown_bytes": max(clock.resident[-tenth:]) - max(clock.resident[tenth : 2 * tenth]),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
