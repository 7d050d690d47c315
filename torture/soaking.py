"""Run after run through one control plane: memory and file handles stay flat."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import psutil

from flash.artifacts.manifests import write_checkpoint
from flash.control_plane.cleaning import Cleaner
from flash.records import RunState
from torture.plane import Plane
from torture.tally import Tally

MOST_BYTES = 40 << 20  # of growth after the first runs, which fill caches
MOST_HANDLES = 8


def soak(count: int, seed: int) -> Tally:
    """`count` tiny runs; every tenth loses its first worker."""
    del seed  # nothing here is left to chance
    tally = Tally()
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        plane = Plane(Path(folder) / "home", work_grace_s=0.0, clean_budget_s=3600.0)
        saved = Path(folder) / "saved"
        try:
            warm = max(10, count // 5)
            for number in range(count):
                if number == warm:
                    gc.collect()
                    first = process.memory_info().rss, process.num_fds(), process.num_threads()
                _run(plane, saved, number, tally)
                if number % 50 == 0:
                    Cleaner(plane.services).clean()
            gc.collect()
            last = process.memory_info().rss, process.num_fds(), process.num_threads()
        finally:
            plane.close()
    grown = last[0] - first[0]
    tally.note = f"{grown / 2**20:.1f} MiB grown, handles {first[1]} to {last[1]}, threads {first[2]} to {last[2]}"
    if grown > MOST_BYTES or last[1] - first[1] > MOST_HANDLES or last[2] - first[2] > MOST_HANDLES:
        tally.losses.append(f"it grows: {tally.note}")
        tally.survived -= 1
    return tally


def _run(plane: Plane, saved: Path, number: int, tally: Tally) -> None:
    run_id = plane.submit(max_steps=3)
    plane.settle()
    epoch = 1
    if number % 10 == 0:
        worker = plane.worker(run_id, 1)
        worker.claim()
        worker.tell(5)
        plane.launcher.die(worker.attempt_id)
        plane.settle()
        epoch = 2
    worker = plane.worker(run_id, epoch)
    worker.claim()
    for step in range(1, 4):
        worker.tell(20)
        worker.beat(step)
    for name in ("adapter/weights", "state/optimizer"):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(b"%d" % number * 100)
    _, sha256 = write_checkpoint(plane.services.store, run_id, 3, saved, True, {})
    worker.report(3, True, sha256)
    worker.finish("done")
    plane.launcher.die(worker.attempt_id)
    plane.settle()
    state = plane.state(run_id)
    tally.count(state is RunState.DONE, f"{run_id} is {state.value}")
