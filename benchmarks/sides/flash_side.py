"""What our sides share: a base as the trainer has it, an environment in this process, a clock."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.config.load import parse_config
from flash.config.recipes import RunSpec, resolve
from flash.environments.protocol import EnvironmentInfo, EpisodeStart, FinishedEpisode, Rows, Score
from flash.inference.lanes import share_cpus
from flash.inference.loading import BaseModel, load_base
from flash.training.reporter import RecordingReporter


def spec_of(train: Mapping[str, Any], *, algorithm: str = "sft", thinking: bool = False, seed: int = 0) -> RunSpec:
    config, _ = parse_config({
        "model": "flash/nano", "algorithm": algorithm, "thinking": thinking, "environment": {"id": "local/bench"},
        "train": {**train, "save_every": 1_000_000},
    })  # fmt: skip
    return resolve(config, seed=seed)


def loaded(job: Mapping[str, Any], *, endless: bool = False) -> BaseModel:
    """`endless`: no token ends a completion, so that every one has max_tokens, as on the other side."""
    base = load_base(Path(job["model"]))
    if endless:
        base = dataclasses.replace(base, stop_ids=())
    return dataclasses.replace(base, lanes=share_cpus(base.model, job["threads"]))


def made_up(index: int, completion: str) -> float:
    """A reward by which groups are hardly ever equal."""
    return float(len(completion) % 7)


class Questions:
    """One row for each input, in this process."""

    def __init__(self, inputs: Sequence[str], reward: Callable[[int, str], float] = made_up) -> None:
        """`reward` is given the row and the raw completion."""
        self._inputs = inputs
        self._reward = reward

    def info(self) -> EnvironmentInfo:
        return EnvironmentInfo(multi_turn=False, splits=("train",))

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        return Rows("train", "", len(self._inputs))

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
        return [EpisodeStart([{"role": "user", "content": self._inputs[index]}], 1) for index in indices]

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        return [Score(self._reward(index, episode.raw)) for episode in episodes]


class Clock(RecordingReporter):
    """When each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.ends.append(time.perf_counter())
