"""A store that fails: at any upload part, with 503, by time-out, for want of space, with objects cut short.

Two of them: a folder behind a stub with the same interface that fails by chance, and a bucket (S3's protocol over
HTTP) behind a proxy that does. The control plane is real; the worker is this test, and for a bucket now and then a
process of its own that is killed at one of its requests. However it goes: what is recorded is whole, `done` means
a verified final adapter, and a clean-up leaves nothing that nobody needs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from flash.artifacts.manifests import Damaged, object_digests, verify, write_checkpoint
from flash.artifacts.store import Store
from flash.control_plane.checkpoints import find_resume
from flash.control_plane.cleaning import Cleaner
from flash.errors import FlashError, Unavailable, from_wire
from flash.records import RunState
from flash.storage import runs
from torture.bucket import Bucket, Kill
from torture.machine import HERE
from torture.plane import Plane, Worker
from torture.tally import Tally

FAULTS = ("killed before", "killed halfway", "killed after", "503", "time-out", "disk full", "truncated")
LARGE = 11 << 20  # bytes: two objects, the first of which a bucket takes in two requests
PART_BYTES = 6 << 20
_WRITER = (sys.executable, str(HERE / "bucket_writer.py"))

Write = Callable[[str, int, Path, bool], str]  # run, step, folder, final: the manifest's SHA-256


class Killed(BaseException):
    """The process is gone: nothing more of it runs."""


class Faulty(Protocol):
    """What fails every now and then: at `rate`, which may be 0, and what it has done so far."""

    rate: float
    injected: list[str]
    chance: random.Random


class FailingStore(Store):
    """A folder store that fails every now and then; `rate` 0 makes it an honest one."""

    def __init__(self, url: str, chance: random.Random) -> None:
        super().__init__(url)
        self.chance = chance
        self.rate = 0.0
        self.injected: list[str] = []

    def put_bytes(self, key: str, data: bytes, *, create: bool = False) -> None:
        fault = self._fault(key)
        if fault == "truncated":
            super().put_bytes(key, data[: len(data) // 2])
            return
        super().put_bytes(key, data, create=create)
        self._after(fault)

    def put_file(self, key: str, path: Path) -> None:
        fault = self._fault(key)
        if fault == "truncated":
            super().put_bytes(key, path.read_bytes()[:-1])
            return
        super().put_file(key, path)
        self._after(fault)

    def size(self, key: str) -> int | None:
        self._refuse()
        return super().size(key)

    def get_bytes(self, key: str) -> bytes:
        self._refuse()
        return super().get_bytes(key)

    def stream(self, key: str) -> Iterator[bytes]:
        self._refuse()
        return super().stream(key)

    def _fault(self, key: str) -> str | None:
        """Fails before anything is written, or names what shall fail afterwards."""
        if self.chance.random() >= self.rate:
            return None
        fault = self.chance.choice(FAULTS)
        self.injected.append(fault)
        if fault == "killed before":
            raise Killed
        if fault == "killed halfway":  # what a killed writer leaves: a draft under its temporary name
            draft = Path(self._root or "", f"{key}#{self.chance.getrandbits(40)}")
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(b"half")
            raise Killed
        if fault in ("503", "time-out", "disk full"):
            raise Unavailable(f"the artifact store failed on {key}: {fault}")
        return fault

    def _after(self, fault: str | None) -> None:
        if fault == "killed after":
            raise Killed

    def _refuse(self) -> None:
        if self.chance.random() < self.rate / 4:
            self.injected.append("503")
            raise Unavailable("the artifact store failed: 503")


def folder(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "home"
        store = FailingStore((home / "artifacts").as_uri(), chance)

        def write(run_id: str, step: int, saved: Path, final: bool) -> str:
            return write_checkpoint(store, run_id, step, saved, final, {})[1]

        return _rounds(home, store, store, write, count, large=0.0)


def bucket(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place, Bucket(chance) as failing:
        store = Store(failing.url, failing.options)

        def write(run_id: str, step: int, saved: Path, final: bool) -> str:
            if chance.random() < 0.3:
                return _write_and_die(failing, run_id, step, saved, final)
            return write_checkpoint(store, run_id, step, saved, final, {}, part_bytes=PART_BYTES)[1]

        return _rounds(Path(place) / "home", store, failing, write, count, large=0.3)


def _write_and_die(failing: Bucket, run_id: str, step: int, saved: Path, final: bool) -> str:
    """The same by a process that is killed at one of its requests, if it makes that many."""
    job = {
        "url": failing.url, "options": failing.options, "run_id": run_id, "step": step, "folder": str(saved),
        "final": final, "part_bytes": PART_BYTES,
    }  # fmt: skip
    with subprocess.Popen(_WRITER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        failing.kill = Kill(writer.pid, failing.chance.randint(1, 12), after=failing.chance.random() < 0.5)
        said, _ = writer.communicate(json.dumps(job).encode())
    failing.kill = None
    if not said.strip():
        raise Killed
    answer = json.loads(said)
    if "error" in answer:
        raise from_wire(answer["error"])
    return str(answer["sha256"])


def _rounds(home: Path, store: Store, faulty: Faulty, write: Write, count: int, *, large: float) -> Tally:
    """Runs over the failing store until `count` faults have happened."""
    tally = Tally()
    plane = Plane(
        home, work_grace_s=0.0, draft_grace_s=0.0, clean_interval_s=0.0, clean_budget_s=3600.0, fruitless_limit=10**6,
        store_url=store.url, store_options=store.options,
    )  # fmt: skip
    plane.services.store = store
    try:
        while tally.injected < count:
            before = len(faulty.injected)
            losses = _run(plane, faulty, write, home.parent, large)
            for _ in range(len(faulty.injected) - before):
                tally.count(not losses, "; ".join(losses))
    finally:
        plane.close()
    tally.counts = {kind: faulty.injected.count(kind) for kind in set(faulty.injected)}
    return tally


def _run(plane: Plane, faulty: Faulty, write: Write, folder: Path, large: float) -> list[str]:
    """One run of several saves and as many attempts as its faults cost it; what it did wrong."""
    run_id = plane.submit()
    losses: list[str] = []
    chance = faulty.chance
    steps, epoch = chance.randint(2, 5), 0
    while plane.state(run_id) is not RunState.DONE:
        epoch += 1
        if epoch > 200:
            return [*losses, f"{run_id} never ends"]
        plane.settle()
        worker = plane.worker(run_id, epoch)
        faulty.rate = 0.15
        try:
            resumed = worker.claim()
            for step in range(resumed + 1, steps + 1):
                saved = _saved(folder, step, chance.randbytes(LARGE) if chance.random() < large else b"")
                _save(write, worker, run_id, step, saved, step == steps)
            worker.finish("done")
        except (Killed, FlashError):
            pass
        faulty.rate = 0.0
        losses += _promises(plane, run_id)
        plane.launcher.die(worker.attempt_id)
        plane.settle()
    Cleaner(plane.services).clean()
    return losses + _leftovers(plane, run_id)


def _saved(folder: Path, step: int, more: bytes) -> Path:
    """A checkpoint's folder, as a trainer leaves it."""
    saved = folder / f"step-{step}"
    for name, body in {"adapter/weights": b"w%d" % step * 50, "state/optimizer": b"o%d" % step * 50 + more}.items():
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(body)
    return saved


def _save(write: Write, worker: Worker, run_id: str, step: int, saved: Path, final: bool) -> None:
    """Uploads and reports as a worker's uploader does: again and again, until it is taken."""
    for _ in range(20):
        try:
            worker.report(step, final, write(run_id, step, saved, final))
            return
        except FlashError:
            continue
    raise Unavailable("the store would not take it")


def _promises(plane: Plane, run_id: str) -> list[str]:
    """Every recorded checkpoint is whole by size, and what a successor would take is whole by digest."""
    losses = []
    store = plane.services.store
    with plane.services.database.read() as connection:
        known = runs.checkpoints_of(connection, run_id)
        manifests = [runs.manifest_of(connection, run_id, found.step) for found in known]
    for found, manifest in zip(known, manifests, strict=True):
        try:
            verify(store, manifest, only=None if found.has_state else "adapter")
        except Damaged as error:
            losses.append(f"visible and not whole: {error}")
    taken = find_resume(plane.services, run_id)
    if taken is not None:
        verify(store, taken, digests=True)
    if plane.state(run_id) is RunState.DONE and not any(found.final for found in known):
        losses.append(f"{run_id} is done without a final adapter")
    return losses


def _leftovers(plane: Plane, run_id: str) -> list[str]:
    store = plane.services.store
    with plane.services.database.read() as connection:
        known = runs.checkpoints_of(connection, run_id)
        named = set().union(
            *(
                object_digests(runs.manifest_of(connection, run_id, found.step), None if found.has_state else "adapter")
                for found in known
            )
        )
    there = {key.rpartition("/")[2] for key in store.list(f"runs/{run_id}/objects")}
    manifests = store.list(f"runs/{run_id}/checkpoints")
    losses = [f"orphan object {name[:12]}" for name in sorted(there - named)]
    losses += [f"missing object {name[:12]}" for name in sorted(named - there)]
    losses += [f"{len(manifests)} manifests for {len(known)} checkpoints"] if len(manifests) != len(known) else []
    drafts = [] if store._root is None else [path.name for path in store._root.rglob("*#*")]
    return losses + [f"draft {name}" for name in drafts]
