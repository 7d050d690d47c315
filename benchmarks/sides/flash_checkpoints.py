"""One SFT run at its recipe's own pace of saving, with a slow store behind it; counts what training waited.

What the training thread does for a checkpoint (writing, syncing, handing over) is waiting; uploads go on beside
it through the worker's own uploader, to a store that takes `store_s` seconds an object.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flash.artifacts.store import Store
from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.environments.loading import LocalEnvironment
from flash.inference.lanes import share_cpus
from flash.inference.loading import load_base
from flash.records import CheckpointReport
from flash.training import grpo, sft
from flash.training.reporter import RecordingReporter
from flash.worker.settings import WorkerSettings
from flash.worker.uploading import LocalCheckpoint, Uploader


class SlowStore(Store):
    """A folder store as far away as a bucket on a bad day."""

    delay_s = 0.0

    def put_file(self, key: str, path: Path) -> None:
        time.sleep(self.delay_s)
        super().put_file(key, path)


class Plane:
    def __init__(self) -> None:
        self.reported: list[CheckpointReport] = []

    def report_checkpoint(self, report: CheckpointReport) -> None:
        self.reported.append(report)


class Reporter(RecordingReporter):
    """Hands checkpoints to the uploader, as the supervisor does."""

    def __init__(self, uploader: Uploader) -> None:
        super().__init__()
        self._uploader = uploader

    def checkpoint(self, folder: Path, *, step: int, final: bool, metrics: Any, seconds: float) -> None:
        self._uploader.submit(LocalCheckpoint(folder, step, final, dict(metrics)))


def main() -> None:
    job = json.loads(sys.stdin.read())
    algorithm = {"sft": sft, "grpo": grpo}[job["algorithm"]]
    waited, saves = 0.0, 0
    write: Any = algorithm.write_checkpoint

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal waited, saves
        began = time.perf_counter()
        folder = write(*arguments, **named)
        waited += time.perf_counter() - began
        saves += 1
        return folder

    algorithm.write_checkpoint = timed  # type: ignore[attr-defined]
    asked = {"model": "flash/nano", "environment": {"id": "local/bench"}}
    config, _ = parse_config({**asked, "algorithm": job["algorithm"], "train": job["train"]})
    spec = resolve(config, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        store = SlowStore(Path(folder, "store").as_uri())
        store.delay_s = job["store_s"]
        plane = Plane()
        uploader = Uploader(
            store, plane, "flash-1-00000000", 1, WorkerSettings(), log=lambda text: None, warn=lambda text: None,
            on_progress=lambda: None, on_fenced=lambda error: None,
        )  # fmt: skip
        uploader.start()
        environment = LocalEnvironment(Path(job["environment"]), {}, Path(folder))
        base = load_base(Path(job["model"]))
        base = dataclasses.replace(base, lanes=share_cpus(base.model, job["threads"]))  # as the trainer does
        reporter = Reporter(uploader)
        began = time.perf_counter()
        algorithm.train(spec, base, environment, reporter, work_dir=Path(folder))
        total = time.perf_counter() - began
        uploader.flush(600)
        final = bool(plane.reported and plane.reported[-1].final)
        uploader.end()
    print(json.dumps({
        "seconds": total, "waited_s": waited, "saves": saves, "uploaded": len(plane.reported), "final_uploaded": final,
        "save_every": spec.train.save_every, "steps": len(reporter.of("metrics")), "threads": threading.active_count(),
    }))


if __name__ == "__main__":
    main()
