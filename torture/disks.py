"""Disks that are really full: small file systems of their own under artifacts, work folder and database.

Each is a tmpfs that a ballast file fills to the last byte while flash/nano really trains, and that is freed a little
later. The run must go on by itself, and end with the adapter that a run which nobody disturbed has. It happens in a
mount namespace, so that nothing stays mounted: as root, or where the system lets a user have one.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torture.machine import Machine, wait_for
from torture.resuming import SFT
from torture.tally import Tally, Unsupported

MIB = 48
TRAIN = {**SFT, "epochs": 10_000, "max_steps": 400, "save_every": 10}
_PRIVATE = (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount"))


class Disk:
    """A file system of `MIB` MiB at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MIB}m,mode=700", "tmpfs", str(folder)], check=True)
        self._ballast = folder / ".ballast"

    def fill(self) -> None:
        """Leaves no room: in large writes, then in small ones."""
        with contextlib.suppress(FileNotFoundError), self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


def namespace() -> tuple[str, ...]:
    """The command in front of one that may mount what it likes, seen by nobody else."""
    for command in _PRIVATE:
        with contextlib.suppress(FileNotFoundError):
            mount = [*command, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
            if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
                return command
    raise Unsupported("no small disk can be made here: that takes Linux, and root or user namespaces")


def faults(count: int, seed: int) -> Tally:
    command = [*namespace(), sys.executable, "-m", "torture.disks", str(count), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Tally(**json.loads(done.stdout.strip().splitlines()[-1]))


def _faults(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    tally = Tally()
    with _machine() as (machine, disks):
        first = machine.submit(TRAIN)
        assert machine.ended(first)["state"] == "done", machine.status(first)["summary"]
        expected = machine.adapter_sha256(first)
        while tally.injected < count:
            _run(machine, disks, expected, count - tally.injected, chance, tally)
    return tally


@contextlib.contextmanager
def _machine(**settings: str) -> Iterator[tuple[Machine, dict[str, Disk]]]:
    """A machine whose artifacts, work folder and database are on small disks of their own."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        disks = {name: Disk(home / name) for name in ("artifacts", "work", "database")}
        own = {
            "FLASH_SERVER_DATABASE_URL": f"sqlite:///{home}/database/flash.db",
            "FLASH_SERVER_WORK_GRACE_S": "0",
            "FLASH_SERVER_CLEAN_INTERVAL_S": "1",
        }
        machine = Machine(home, **own, **settings)
        try:
            machine.start()
            machine.push()
            yield machine, disks
        finally:
            machine.close()
            for disk in disks.values():
                subprocess.run(["umount", "--lazy", str(disk.folder)], check=False)


def _run(
    machine: Machine,
    disks: dict[str, Disk],
    expected: str,
    most: int,
    chance: random.Random,
    tally: Tally,
) -> None:
    """One run, whose disks are full for a while now and then, while it starts or, more often, while it trains."""
    run_id = machine.submit(TRAIN)
    filled: list[str] = []
    for _ in range(min(most, 4)):
        if chance.random() < 0.8:
            wait_for(lambda: machine.status(run_id)["state"] != "running" or machine.status(run_id)["step"] > 0)
        time.sleep(chance.uniform(0, 1.5))
        if machine.status(run_id)["state"] in ("done", "failed"):
            break
        name = chance.choice(list(disks))
        disks[name].fill()
        time.sleep(chance.uniform(0.2, 3.0))
        disks[name].free()
        filled.append(name)
    status = machine.ended(run_id)
    same = status["state"] == "done" and machine.adapter_sha256(run_id) == expected
    whole = all(event["seq"] == at for at, event in enumerate(machine.events(run_id), 1))
    shutil.rmtree(machine.home / "artifacts" / "runs" / run_id)  # its disk is small
    for name in filled:
        tally.count(same and whole, f"{run_id} ({name} full): {status['summary']}; same {same}, events {whole}")


def stuck(name: str) -> dict[str, Any]:
    """A run that meets a disk which stays full: its last status, and what a submit is told meanwhile."""
    command = [*namespace(), sys.executable, "-m", "torture.disks", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _stuck(name: str) -> dict[str, Any]:
    hasty = {"FLASH_SERVER_FRUITLESS_LIMIT": "2", "FLASH_WORKER_SETTINGS": json.dumps({"upload_patience_s": 1})}
    with _machine(**hasty) as (machine, disks):
        run_id = machine.submit(TRAIN)
        wait_for(lambda: machine.status(run_id)["step"] > 0)
        disks[name].fill()
        config = {"model": "flash/nano", "environment": {"id": "local/echo"}, "worker_env": {"NOTE": "word " * 20_000}}
        told = machine.http.post("/api/runs", json={"config": config})
        if name == "database":
            time.sleep(1)
            disks[name].free()
        return {"status": machine.ended(run_id), "told": [told.status_code, told.json()]}


if __name__ == "__main__":
    found = _stuck(sys.argv[1]) if len(sys.argv) == 2 else vars(_faults(int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps(found), flush=True)
