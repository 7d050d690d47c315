"""Our side of `quality`: the trainers as a run calls them, and how the score grew.

Reads a job (JSON on stdin), prints one JSON line.
"""

import time

BEGAN = time.perf_counter()

import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from exact_match import reward  # noqa: E402

from flash.config.load import parse_config  # noqa: E402
from flash.config.recipes import resolve  # noqa: E402
from flash.environments.loading import LocalEnvironment  # noqa: E402
from flash.environments.protocol import EnvironmentInfo, EpisodeStart, FinishedEpisode, Rows, Score  # noqa: E402
from flash.inference.lanes import share_cpus  # noqa: E402
from flash.inference.loading import load_base  # noqa: E402
from flash.training import grpo, sft  # noqa: E402
from flash.training.reporter import RecordingReporter  # noqa: E402


class Questions:
    """The job's rows as an environment in this process."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._rows = rows

    def info(self) -> EnvironmentInfo:
        return EnvironmentInfo(multi_turn=False, splits=("train",))

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        return Rows("train", "", len(self._rows))

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
        return [EpisodeStart([{"role": "user", "content": self._rows[index]["input"]}], 1) for index in indices]

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        return [Score(reward(episode.raw, self._rows[index]["output"])) for episode in episodes]


class Curve(RecordingReporter):
    """(seconds since the process began, score) of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[float, float]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        score = values["reward"] if "reward" in values else -values["loss"] if "loss" in values else None
        if score is not None:
            self.points.append((time.perf_counter() - BEGAN, score))


def main() -> None:
    job = json.load(sys.stdin)
    config, _ = parse_config({
        "model": "flash/nano", "algorithm": job["algorithm"], "thinking": job["thinking"],
        "environment": {"id": "local/bench"},
        "train": {**job["train"], "save_every": 1_000_000},
    })  # fmt: skip
    base = load_base(Path(job["model"]))
    base = dataclasses.replace(base, lanes=share_cpus(base.model, job["threads"]))  # as the trainer does
    curve, spec = Curve(), resolve(config, seed=job["seed"])
    with tempfile.TemporaryDirectory() as folder:
        if job["algorithm"] == "grpo":
            grpo.train(spec, base, Questions(job["rows"]), curve, work_dir=Path(folder))
        else:
            environment = LocalEnvironment(Path(job["environment"]), {}, Path(folder) / "env")
            sft.train(spec, base, environment, curve, work_dir=Path(folder))
    print(json.dumps({"curve": curve.points}))


if __name__ == "__main__":
    main()
