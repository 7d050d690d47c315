"""SIGSTOP past the lease, then SIGCONT: nothing that the fenced attempt writes is accepted, and it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from sqlalchemy import func, select

from flash.control_plane.app import create_app
from flash.control_plane.services import Services, open_services
from flash.control_plane.settings import ServerSettings
from flash.launching.fake import FakeLauncher
from flash.launching.launcher import LaunchRequest
from flash.records import SubmitRequest
from flash.storage import identity, runs, schema
from flash.storage.identity import Caller, Role
from torture.machine import ENVIRONMENT, HERE, SETTINGS, archive, wait_for
from torture.tally import Tally

LEASE_S = 1.5


class FarLauncher(FakeLauncher):
    """Starts real workers on a machine that can't be reached afterwards: a kill gets nowhere."""

    def __init__(self, home: Path) -> None:
        super().__init__(("cpu",), stubborn=True)
        self._home = home
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def launch(self, request: LaunchRequest) -> str:
        Path(request.work_dir).mkdir(parents=True, exist_ok=True)
        with (self._home / "workers.out").open("ab") as output:
            worker = subprocess.Popen(
                [sys.executable, str(HERE / "scripted_supervisor.py")],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **SETTINGS, "FLASH_HOME": str(self._home), "FLASH_ATTEMPT_ID": request.attempt_id},
                start_new_session=True,
            )
        assert worker.stdin is not None
        fields = ("attempt_id", "api_url", "token", "work_dir", "device")
        worker.stdin.write(json.dumps({name: getattr(request, name) for name in fields}).encode() + b"\n")
        worker.stdin.close()
        self.workers[request.attempt_id] = worker
        return super().launch(request)


def stops(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        launcher = FarLauncher(home)
        settings = ServerSettings(
            home=home, lease_s=LEASE_S, heartbeat_s=0.1, reconcile_interval_s=0.05, fruitless_limit=10**6,
            backoff_first_s=0.0, backoff_max_s=0.0,
        )  # fmt: skip
        plane = open_services(settings, launcher=launcher)
        with plane.database.write() as connection:
            identity.add_key(connection, org="local", token="key-of-the-test", name="test")
        server, thread, url = _serve(plane, settings)
        try:
            run_id = _submit(plane, url)
            for epoch in range(1, count + 1):
                loss = _one(plane, launcher, run_id, epoch, chance)
                tally.count(not loss, loss)
        finally:
            server.should_exit = True
            thread.join(30)  # before the workers are killed: until then more are launched
            for worker in launcher.workers.values():
                _kill_tree(worker)
            plane.close()
    return tally


def _serve(plane: Services, settings: ServerSettings) -> tuple[uvicorn.Server, threading.Thread, str]:
    listener = socket.create_server(("127.0.0.1", 0))
    plane.api_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(create_app(settings, services=plane), log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 30, 0.02)
    return server, thread, plane.api_url


def _submit(plane: Services, url: str) -> str:
    import httpx

    from flash.control_plane.submitting import submit

    headers = {"Authorization": "Bearer key-of-the-test"}
    body = archive({"environment.py": ENVIRONMENT})
    httpx.post(f"{url}/api/environments/local/echo", content=body, headers=headers).raise_for_status()
    config = {
        "model": "flash/nano",
        "environment": {"id": "local/echo"},
        "train": {"max_steps": 10**7, "save_every": 20, "batch_size": 5},
    }
    return submit(plane, Caller("local", Role.OWNER), SubmitRequest(config=config), None).run_id


def _one(plane: Services, launcher: FarLauncher, run_id: str, epoch: int, chance: random.Random) -> str:
    """Stops a live worker, waits for the fence, lets it go on; what went wrong, if anything."""
    attempt_id = runs.attempt_id(run_id, epoch)
    wait_for(lambda: attempt_id in launcher.workers and _written(plane, run_id, epoch) > 0)
    worker = launcher.workers[attempt_id]
    time.sleep(chance.uniform(0, 0.3))
    tree = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    stopped = tree if chance.random() < 0.5 else tree[:1]  # its trainer may go on meanwhile
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    wait_for(lambda: _attempt(plane, run_id, epoch).state.value == "ending", 60, 0.02)
    before = _written(plane, run_id, epoch), _checkpoints(plane, run_id, epoch)
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):  # the first of them may have ended the others
            process.send_signal(signal.SIGCONT)
    try:
        status = worker.wait(30)
    except subprocess.TimeoutExpired:
        return f"attempt {epoch} went on after its lease"
    after = _written(plane, run_id, epoch), _checkpoints(plane, run_id, epoch)
    launcher.die(attempt_id)
    if before != after:
        return f"attempt {epoch} wrote {after} where the fence stood at {before}"
    return "" if status in (3, 4) else f"attempt {epoch}: its worker ended with {status}"


def _attempt(plane: Services, run_id: str, epoch: int) -> runs.AttemptRow:
    with plane.database.read() as connection:
        return runs.get_attempt(connection, run_id, epoch)


def _written(plane: Services, run_id: str, epoch: int) -> int:
    """Events of this attempt in the history that the worker sent itself."""
    table = schema.events
    query = select(func.count()).where(table.c.run_id == run_id, table.c.epoch == epoch, table.c.n.is_not(None))
    with plane.database.read() as connection:
        return int(connection.execute(query).scalar_one())


def _checkpoints(plane: Services, run_id: str, epoch: int) -> int:
    with plane.database.read() as connection:
        return sum(found.epoch == epoch for found in runs.checkpoints_of(connection, run_id))


def _kill_tree(worker: subprocess.Popen[Any]) -> None:
    if worker.poll() is None:
        for process in psutil.Process(worker.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        worker.kill()
    worker.wait()
