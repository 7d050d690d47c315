"""A whole control plane in this process: real database and store, workers played by the test."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from flash.artifacts.manifests import write_checkpoint
from flash.control_plane.app import create_app
from flash.control_plane.reconciler import Action, Reconciler
from flash.control_plane.services import Services, open_services
from flash.control_plane.settings import ServerSettings
from flash.control_plane.stopwatches import Stopwatches
from flash.launching.fake import FakeLauncher
from flash.storage import identity
from flash.storage.database import Database

SETTINGS = {"backoff_first_s": 0.0, "backoff_max_s": 0.0, "clean_budget_s": 600.0}


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Worker:
    """A worker as the API sees one."""

    world: World
    attempt_id: str
    token: str
    epoch: int
    sent: int = 0

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        url = f"/worker/attempts/{self.attempt_id}/{path}"
        return self.world.http.post(url, json=body, headers={"Authorization": f"Bearer {self.token}"})

    def claim(self, pid: int = 77) -> dict[str, Any]:
        answer = self.post("claim", {"pid": pid, "device": "cpu"})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def beat(self, step: int = 0, progress: int = 0, phase: str = "training") -> httpx.Response:
        return self.post("heartbeat", {"epoch": self.epoch, "phase": phase, "step": step, "progress": progress})

    def tell(self, kind: str, **data: Any) -> int:
        self.sent += 1
        event = {"n": self.sent, "time": 1.0, "kind": kind, "data": data}
        answer = self.post("events", {"epoch": self.epoch, "events": [event]})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["acknowledged"])

    def save(self, step: int, *, final: bool = False, weights: bytes | None = None) -> None:
        folder = self.world.home / "saves" / self.attempt_id / str(step)
        for name, body in {"adapter/model": weights or b"weights %d" % step, "state/optimizer": b"o %d" % step}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(body)
        run_id = self.attempt_id.rpartition(".")[0]
        _, sha256 = write_checkpoint(self.world.plane.store, run_id, step, folder, final, {"loss": 1.0})
        report = {"epoch": self.epoch, "step": step, "final": final, "manifest_sha256": sha256}
        answer = self.post("checkpoints", report)
        assert answer.status_code == 204, answer.text

    def finish(self, outcome: str, *, failure: str | None = None, message: str = "it broke") -> httpx.Response:
        body: dict[str, Any] = {"epoch": self.epoch, "outcome": outcome, "failure": failure}
        if outcome == "failed":
            body["error"] = {"code": "user_code", "message": message, "remedy": None, "detail": "Traceback"}
        return self.post("finish", body)


@dataclass
class World:
    home: Path
    plane: Services
    launcher: FakeLauncher
    clock: Clock
    http: TestClient
    token: str
    reconciler: Reconciler
    headers: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}", **request.pop("headers", {})}
        return self.http.request(method, path, headers=headers, **request)

    def push(self, name: str = "arith", body: str = "def load_environment(): ...\n") -> dict[str, Any]:
        answer = self.call("POST", f"/api/environments/local/{name}", content=archive({"environment.py": body}))
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def config(self, **train: Any) -> dict[str, Any]:
        return {"model": "flash/nano", "environment": {"id": "local/arith"}, "train": train}

    def submit(self, *, key: str | None = None, **train: Any) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.call("POST", "/api/runs", json={"config": self.config(**train)}, headers=headers)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run_id"])

    def settle(self) -> list[Action]:
        """Ticks until nothing changes any more."""
        done: list[Action] = []
        for _ in range(20):
            changed = self.reconciler.tick()
            if not changed:
                return done
            done += changed
        raise AssertionError(f"it never comes to rest: {done[-6:]}")

    def worker(self, run_id: str, epoch: int = 1) -> Worker:
        """The worker that the launcher was asked to start."""
        attempt_id = f"{run_id}.{epoch}"
        return Worker(self, attempt_id, self.launcher.requests[attempt_id].token, epoch)

    def started(self, **train: Any) -> tuple[str, Worker]:
        """A run whose first attempt is claimed."""
        run_id = self.submit(**train)
        self.settle()
        worker = self.worker(run_id)
        worker.claim()
        return run_id, worker

    def status(self, run_id: str) -> dict[str, Any]:
        answer = self.call("GET", f"/api/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def events(self, run_id: str, **query: Any) -> list[dict[str, Any]]:
        return list(self.call("GET", f"/api/runs/{run_id}/events", params=query).json()["events"])


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def open_world(home: Path, token: str, launcher: FakeLauncher, clock: Clock, **settings: Any) -> World:
    values = ServerSettings(home=home, **{**SETTINGS, **settings})
    plane = open_services(values, launcher=launcher, stopwatches=Stopwatches(clock))
    if plane.database.shared:  # where the database's clock counts, the test moves that too
        plane.clock = lambda: plane.database.clock() + clock.now
    with plane.database.write() as connection:
        identity.add_key(connection, org="local", token=token, name="test")
    http = TestClient(create_app(values, services=plane, reconcile=False), raise_server_exceptions=False)
    return World(home, plane, launcher, clock, http, token, Reconciler(plane))


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database at head, made once: migrating one for each test would take longer than the tests."""
    path = tmp_path_factory.mktemp("migrated") / "flash.db"
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, migrated: Path) -> str | None:
    """Every test of the plane runs on both databases, on Postgres with the slow ones."""
    (tmp_path / "home").mkdir()
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_database"))
    shutil.copy(migrated, tmp_path / "home" / "flash.db")
    return None


@pytest.fixture
def world(tmp_path: Path, database_url: str | None, request: pytest.FixtureRequest) -> Iterator[World]:
    """Settings for one test: `@pytest.mark.parametrize("world", [{...}], indirect=True)`."""
    settings = {"database_url": database_url, **getattr(request, "param", {})}
    opened = open_world(tmp_path / "home", identity.new_token(), FakeLauncher(), Clock(), **settings)
    opened.push()
    with opened.http:
        yield opened
    opened.plane.close()


@pytest.fixture
def restart():
    """`restart(world)`: the same home, launcher and clock under a new server; the old one is gone."""
    opened: list[World] = []

    def again(world: World) -> World:
        world.plane.close()
        database_url = world.plane.settings.database_url
        later = open_world(world.home, world.token, world.launcher, world.clock, database_url=database_url)
        opened.append(later)
        return later

    yield again
    for each in opened:
        each.plane.close()


@pytest.fixture
def pack():
    return archive
