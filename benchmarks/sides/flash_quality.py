"""Our side of `quality`: the trainers as a run calls them, and how the score grew.

Reads a job (JSON on stdin), prints one JSON line.
"""

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from exact_match import reward
from flash_side import Questions, loaded, spec_of

from flash.environments.loading import LocalEnvironment
from flash.training import grpo, sft
from flash.training.reporter import RecordingReporter


class TimeIsOver(Exception):
    pass


class Curve(RecordingReporter):
    """(seconds on a clock of its own, score) of each step; ends the run `limit_s` after its first one."""

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self._limit_s = limit_s
        self.points: list[tuple[float, float]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        score = values["reward"] if "reward" in values else -values["loss"] if "loss" in values else None
        if score is not None:
            self.points.append((time.perf_counter(), score))
            if self.points[-1][0] - self.points[0][0] >= self._limit_s:
                raise TimeIsOver


def main() -> None:
    job = json.load(sys.stdin)
    rows, base, curve = job["rows"], loaded(job), Curve(job.get("limit_s", math.inf))
    spec = spec_of(job["train"], algorithm=job["algorithm"], thinking=job["thinking"], seed=job["seed"])
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TimeIsOver):
        if job["algorithm"] == "grpo":
            questions = Questions([row["input"] for row in rows], lambda i, answer: reward(answer, rows[i]["output"]))
            grpo.train(spec, base, questions, curve, work_dir=Path(folder))
        else:
            environment = LocalEnvironment(Path(job["environment"]), {}, Path(folder) / "env")
            sft.train(spec, base, environment, curve, work_dir=Path(folder))
    print(json.dumps({"curve": curve.points}))


if __name__ == "__main__":
    main()
