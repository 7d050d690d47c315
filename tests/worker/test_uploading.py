"""The uploader against a real store in a folder, and a plane that checks what it is told."""

from __future__ import annotations

import threading

import pytest

from flash.artifacts.manifests import read_manifest, verify
from flash.artifacts.store import Store
from flash.errors import Conflict, InvalidInput, Unavailable
from flash.worker.settings import WorkerSettings
from flash.worker.uploading import LocalCheckpoint, Uploader

RUN = "flash-1700000000-0000abcd"
FAST = WorkerSettings(retry_first_s=0.005, retry_most_s=0.02)


class Plane:
    """Checks each report against the store, as the control plane does; holds and fails as told."""

    def __init__(self, store):
        self.store, self.reports, self.faults = store, [], []
        self.hold = threading.Event()
        self.hold.set()
        self.asked = threading.Semaphore(0)

    def report_checkpoint(self, report):
        self.asked.release()
        assert self.hold.wait(5)
        if self.faults and (fault := self.faults.pop(0)):
            raise fault
        manifest, sha256 = read_manifest(self.store, RUN, report.step)
        verify(self.store, manifest, digests=True)
        assert (sha256, manifest.final) == (report.manifest_sha256, report.final)
        self.reports.append((report.step, report.final))


class Bench:
    def __init__(self, tmp_path):
        self.folder = tmp_path / "checkpoints"
        self.store = Store(f"file://{tmp_path}/store")
        self.plane = Plane(self.store)
        self.log, self.warnings, self.fenced = [], [], []
        self.uploader = Uploader(
            self.store, self.plane, RUN, 1, FAST,
            log=self.log.append, warn=self.warnings.append, on_progress=lambda: None, on_fenced=self.fenced.append,
        )  # fmt: skip
        self.uploader.start()

    def save(self, step, *, final=False):
        folder = self.folder / f"step-{step}"
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "adapter" / "weights").write_bytes(b"%d" % step * 100)
        self.uploader.submit(LocalCheckpoint(folder, step, final, {"loss": 0.5}))

    def kept(self):
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def bench(tmp_path):
    built = Bench(tmp_path)
    yield built
    built.plane.hold.set()
    built.uploader.end()
    built.uploader.join(5)


def test_while_one_is_in_flight_the_newest_waiting_wins(bench):
    bench.plane.hold.clear()
    bench.save(1)
    bench.plane.asked.acquire(timeout=5)
    for step in (2, 3, 4):
        bench.save(step)
    assert bench.kept() == ["step-1", "step-4"]  # passed over: gone; in flight or waiting: kept
    bench.plane.hold.set()
    assert bench.uploader.flush(5)
    assert bench.plane.reports == [(1, False), (4, False)]
    assert bench.kept() == ["step-4"]
    assert [line.split(" was")[0] for line in bench.log] == ["step 2", "step 3"]


def test_the_final_one_is_never_passed_over(bench):
    bench.plane.hold.clear()
    bench.save(1)
    bench.plane.asked.acquire(timeout=5)
    bench.save(2)
    bench.save(3, final=True)
    bench.save(4)
    bench.plane.hold.set()
    assert bench.uploader.flush(5)
    assert bench.plane.reports == [(1, False), (3, True), (4, False)]
    assert bench.uploader.final_step == 3


def test_a_save_that_turns_out_to_be_the_last_is_promoted(bench):
    bench.save(2)
    assert bench.uploader.flush(5)
    bench.save(2, final=True)
    assert bench.uploader.flush(5)
    assert bench.plane.reports == [(2, False), (2, True)]
    assert bench.kept() == ["step-2"]


def test_a_failing_upload_is_repeated_and_told_once(bench):
    bench.plane.faults = [Unavailable("down"), Unavailable("down"), Unavailable("down")]
    bench.save(1, final=True)
    assert bench.uploader.flush(5)
    assert bench.plane.reports == [(1, True)]
    assert bench.log == [] and len(bench.warnings) == 1 and "tried again: down" in bench.warnings[0]


def test_a_failing_upload_gives_way_to_a_newer_save(bench):
    bench.plane.faults = [Unavailable("down")] * 10_000
    bench.save(1)
    bench.plane.asked.acquire(timeout=5)
    bench.save(2)
    bench.plane.asked.acquire(timeout=5)
    bench.plane.faults = []
    assert bench.uploader.flush(5)
    assert bench.plane.reports[-1] == (2, False)


def test_patience_ends(bench):
    bench.plane.faults = [Unavailable("down")] * 10_000
    bench.save(1, final=True)
    assert not bench.uploader.flush(0.1)
    assert bench.uploader.final_step is None and isinstance(bench.uploader.error, Unavailable)


def test_what_the_plane_keeps_refusing_is_given_up(bench):
    bench.plane.faults = [InvalidInput("digest differs")] * 3
    bench.save(1, final=True)
    assert not bench.uploader.flush(5)
    assert bench.plane.reports == [] and bench.uploader.final_step is None
    assert bench.kept() == ["step-1"]


def test_a_fenced_uploader_stops(bench):
    bench.plane.faults = [Conflict("stale epoch")]
    bench.save(1)
    bench.uploader.join(5)
    assert len(bench.fenced) == 1
    bench.save(2)
    assert not bench.uploader.flush(0.05)
    assert bench.plane.reports == []
