"""Our side of `grpo_cpu`: `training.grpo.train` as a run calls it, with an environment that costs nothing.

Reads a job (JSON on stdin), prints one JSON line.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.environments.protocol import EnvironmentInfo, EpisodeStart, FinishedEpisode, Rows, Score
from flash.inference.lanes import share_cpus
from flash.inference.loading import load_base
from flash.training import grpo
from flash.training.reporter import RecordingReporter


class Prompts:
    """The job's inputs, one prompt each; the reward is made up so that groups are hardly ever equal."""

    def __init__(self, inputs: list[str]) -> None:
        self._inputs = inputs

    def info(self) -> EnvironmentInfo:
        return EnvironmentInfo(multi_turn=False, splits=("train",))

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        return Rows("train", "", len(self._inputs))

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
        return [EpisodeStart([{"role": "user", "content": self._inputs[index]}], 1) for index in indices]

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        return [Score(float(len(episode.response_text) % 7)) for episode in episodes]


class Clock(RecordingReporter):
    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    job = json.load(sys.stdin)
    config, _ = parse_config({
        "model": "flash/nano",
        "algorithm": "grpo",
        "environment": {"id": "local/bench"},
        "train": {
            "lora_rank": job["lora_rank"], "lora_alpha": job["lora_alpha"], "learning_rate": job["learning_rate"],
            "batch_size": job["prompts"], "group_size": job["group_size"], "max_tokens": job["max_tokens"],
            "steps": job["warmup_steps"] + job["steps"], "save_every": 1_000_000,
        },
    })  # fmt: skip
    # no token ends a completion, so that every one has max_tokens, as on the other side
    base = dataclasses.replace(load_base(Path(job["model"])), stop_ids=())
    base = dataclasses.replace(base, lanes=share_cpus(base.model, job["threads"]))  # as the trainer does
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        grpo.train(resolve(config, seed=0), base, Prompts(job["inputs"]), clock, work_dir=Path(folder))
    seconds = clock.ends[-1] - clock.ends[job["warmup_steps"] - 1]
    print(json.dumps({"seconds_per_step": seconds / job["steps"], "settings": "the recipe's defaults"}))


if __name__ == "__main__":
    main()
