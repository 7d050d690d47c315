"""A store that fails: at any upload part, with 503, by time-out, for want of space, with objects cut short.

The store is real, behind a stub with the same interface that fails by chance; the control plane is real; the
worker is this test. However it goes: what is recorded is whole, `done` means a verified final adapter, and a
clean-up leaves nothing that nobody needs.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flash.artifacts.manifests import Damaged, verify, write_checkpoint
from flash.artifacts.store import Store
from flash.control_plane.checkpoints import find_resume
from flash.control_plane.cleaning import Cleaner
from flash.errors import FlashError, NotFound, Unavailable
from flash.records import RunState
from flash.storage import runs
from torture.plane import Plane
from torture.tally import Tally

FAULTS = ("killed before", "killed halfway", "killed after", "503", "time-out", "disk full", "truncated")


class Killed(BaseException):
    """The process is gone: nothing more of it runs."""


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


def faults(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        plane = Plane(Path(folder) / "home", work_grace_s=0.0, draft_grace_s=0.0, fruitless_limit=10**6)
        store = FailingStore(plane.services.store.url, chance)
        plane.services.store = store
        try:
            while tally.injected < count:
                before = len(store.injected)
                losses = _run(plane, store, chance, Path(folder))
                for _ in range(len(store.injected) - before):
                    tally.count(not losses, "; ".join(losses))
        finally:
            plane.close()
    return tally


def _run(plane: Plane, store: FailingStore, chance: random.Random, folder: Path) -> list[str]:
    """One run of several saves and as many attempts as its faults cost it; what it did wrong."""
    run_id = plane.submit()
    losses: list[str] = []
    steps, epoch = chance.randint(2, 5), 0
    while plane.state(run_id) is not RunState.DONE:
        epoch += 1
        if epoch > 200:
            return [*losses, f"{run_id} never ends"]
        plane.settle()
        worker = plane.worker(run_id, epoch)
        store.rate = 0.15
        try:
            resumed = worker.claim()
            for step in range(resumed + 1, steps + 1):
                _save(store, worker, run_id, step, steps, folder, chance)
            worker.finish("done")
        except (Killed, FlashError):
            pass
        store.rate = 0.0
        losses += _promises(plane, store, run_id)
        plane.launcher.die(worker.attempt_id)
        plane.settle()
    Cleaner(plane.services).clean()
    return losses + _leftovers(plane, store, run_id)


def _save(
    store: FailingStore, worker: object, run_id: str, step: int, steps: int, folder: Path, chance: random.Random
) -> None:
    saved = folder / f"step-{step}"
    for name, body in {"adapter/weights": b"w%d" % step * 50, "state/optimizer": b"o%d" % step * 50}.items():
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(body)
    for _ in range(20):
        try:
            _, sha256 = write_checkpoint(store, run_id, step, saved, step == steps, {})
            worker.report(step, step == steps, sha256)  # type: ignore[attr-defined]
            return
        except (Unavailable, NotFound):
            continue
        except FlashError:
            continue
    raise Unavailable("the store would not take it")


def _promises(plane: Plane, store: Store, run_id: str) -> list[str]:
    """Every recorded checkpoint is whole by size, and what a successor would take is whole by digest."""
    losses = []
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


def _leftovers(plane: Plane, store: Store, run_id: str) -> list[str]:
    with plane.services.database.read() as connection:
        known = runs.checkpoints_of(connection, run_id)
        named = {
            file.sha256
            for found in known
            for file in runs.manifest_of(connection, run_id, found.step).files
            if found.has_state or file.path.startswith("adapter/")
        }
    there = {key.rpartition("/")[2] for key in store.list(f"runs/{run_id}/objects")}
    manifests = store.list(f"runs/{run_id}/checkpoints")
    drafts = [path.name for path in Path(store._root or "").rglob("*#*")]
    losses = [f"orphan object {name[:12]}" for name in sorted(there - named)]
    losses += [f"missing object {name[:12]}" for name in sorted(named - there)]
    losses += [f"{len(manifests)} manifests for {len(known)} checkpoints"] if len(manifests) != len(known) else []
    return losses + [f"draft {name}" for name in drafts]
