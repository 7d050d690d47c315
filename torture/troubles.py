"""Trouble in the control plane's own house: a wall clock that jumps, and a database that someone else has locked.

The plane is real, in this process; its workers are played here. Whatever happens: no false `done`, no attempt given
up for it, no event lost or doubled, and what is refused is refused as a whole, in words.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flash.artifacts.manifests import write_checkpoint
from flash.errors import Unavailable
from flash.records import RunState
from flash.storage import runs
from torture.machine import wait_for
from torture.plane import Plane, Worker
from torture.tally import Tally

JUMPS_S = (-10 * 365 * 86400.0, -86400.0, -3600.0, -31.0, -1.0, 1.0, 31.0, 3600.0, 86400.0, 10 * 365 * 86400.0)
STEPS = 4


def jumps(count: int, seed: int) -> Tally:
    """Runs during which the wall clock is set forwards and backwards between any two things that happen."""
    chance = random.Random(seed)
    tally = Tally()
    offset = 0.0
    with tempfile.TemporaryDirectory() as folder:
        plane = Plane(Path(folder) / "home", backoff_first_s=0.02, backoff_max_s=0.05)
        plane.services.clock = lambda: time.time() + offset
        try:
            while tally.injected < count:
                jumped = 0

                def between() -> None:
                    nonlocal offset, jumped
                    if chance.random() < 0.4:
                        jumped += 1
                        offset = max(offset + chance.choice(JUMPS_S), 1e6 - time.time())  # not before 1970
                    plane.reconciler.tick()

                losses = _whole_run(plane, Path(folder), chance.random() < 0.3, between)
                for _ in range(jumped):
                    tally.count(not losses, "; ".join(losses))
        finally:
            plane.close()
    return tally


def _whole_run(plane: Plane, folder: Path, loses_a_worker: bool, between: Callable[[], None]) -> list[str]:
    """A run from submit to `done`, `between` any two requests; what went wrong."""
    run_id = plane.submit()
    plane.settle()
    epoch = 1
    for _ in range(1 + loses_a_worker):
        worker = plane.worker(run_id, epoch)
        between()
        resumed = worker.claim()
        for step in range(resumed + 1, STEPS + 1):
            for act in (lambda: worker.tell(3), lambda: worker.beat(step)):  # noqa: B023
                between()
                act()
            between()
            _save(plane, worker, run_id, step, folder)
            if loses_a_worker and epoch == 1 and step == 2:
                break
        if loses_a_worker and epoch == 1:
            plane.launcher.die(worker.attempt_id)
            wait_for(lambda: plane.reconciler.tick() is not None and _attempts(plane, run_id) == 2, 30, 0.01)
            epoch = 2
    between()
    worker.finish("done")
    between()
    plane.launcher.die(worker.attempt_id)
    plane.settle()
    return _wrong(plane, run_id, attempts=1 + loses_a_worker, told=worker.sent)


def locks(count: int, seed: int) -> Tally:
    """Runs during which requests meet a locked database: each is refused, and taken when it comes again."""
    chance = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        plane = Plane(Path(folder) / "home")
        with plane.services.database.write() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 5")
        try:
            while tally.injected < count:
                before = tally.injected
                losses = _locked_run(plane, Path(folder), chance, tally)
                if losses:
                    tally.losses += losses
                    tally.survived -= min(tally.injected - before, tally.survived)
        finally:
            plane.close()
    return tally


def _locked_run(plane: Plane, folder: Path, chance: random.Random, tally: Tally) -> list[str]:
    """One run whose every request may come at a bad time."""
    other = sqlite3.connect(folder / "home" / "flash.db", isolation_level=None)
    refused: list[str] = []

    def patiently(act: Callable[[], Any]) -> Any:
        """What a client or worker does: asks again when it is told that the service is unavailable."""
        if chance.random() < 0.4:
            other.execute("BEGIN IMMEDIATE")
            try:
                act()
                refused.append("a write was taken though the database was locked")
            except Unavailable as error:
                if "database" not in error.message:
                    refused.append(f"refused with {error.message!r}")
            finally:
                other.execute("ROLLBACK")
            plane.reconciler.tick()
            tally.count(True)
        return act()

    key = f"key-{chance.getrandbits(64)}"
    run_id = patiently(lambda: plane.submit(key=key))
    plane.settle()
    worker = plane.worker(run_id, 1)
    patiently(worker.claim)
    for step in range(1, STEPS + 1):
        patiently(lambda: worker.tell(3))
        patiently(lambda: worker.beat(step))  # noqa: B023
        patiently(lambda: _save(plane, worker, run_id, step, folder))  # noqa: B023
    patiently(lambda: worker.finish("done"))
    plane.launcher.die(worker.attempt_id)
    plane.settle()
    other.close()
    if plane.submit(key=key) != run_id:
        refused.append("a repeated submit made another run")
    return refused + _wrong(plane, run_id, attempts=1, told=worker.sent)


def _save(plane: Plane, worker: Worker, run_id: str, step: int, folder: Path) -> None:
    saved = folder / "saved"
    for name in ("adapter/weights", "state/optimizer"):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(b"%d" % step * 100)
    _, sha256 = write_checkpoint(plane.services.store, run_id, step, saved, step == STEPS, {})
    worker.report(step, step == STEPS, sha256)


def _attempts(plane: Plane, run_id: str) -> int:
    with plane.services.database.read() as connection:
        return len(runs.attempts_of(connection, [run_id])[run_id])


def _wrong(plane: Plane, run_id: str, *, attempts: int, told: int) -> list[str]:
    losses = []
    if (state := plane.state(run_id)) is not RunState.DONE:
        losses.append(f"{run_id} is {state.value}")
    if (found := _attempts(plane, run_id)) != attempts:
        losses.append(f"{run_id} took {found} attempts, not {attempts}")
    events = plane.call("GET", f"/api/runs/{run_id}/events", params={"limit": 10_000}).json()["events"]
    if [event["seq"] for event in events] != list(range(1, len(events) + 1)):
        losses.append(f"{run_id}: its events are not numbered 1 to {len(events)}")
    last = [event for event in events if event["kind"] == "log" and event["epoch"] == attempts]
    if len(last) != told:
        losses.append(f"{run_id}: {len(last)} of the last worker's {told} lines are there")
    return losses
