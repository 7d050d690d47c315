"""A control plane in this process, whose workers are played by the caller: for rows about the protocol alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from flash.control_plane.app import create_app
from flash.control_plane.reconciler import Reconciler
from flash.control_plane.services import open_services
from flash.control_plane.settings import ServerSettings
from flash.errors import from_wire
from flash.launching.fake import FakeLauncher
from flash.records import RunState
from flash.storage import identity, runs
from torture.machine import ENVIRONMENT, archive


class Plane:
    def __init__(self, home: Path, *, devices: tuple[str, ...] = ("cpu",), **settings: Any) -> None:
        values = ServerSettings(home=home, **{"backoff_first_s": 0.0, "backoff_max_s": 0.0, **settings})
        self.launcher = FakeLauncher(devices)
        self.services = open_services(values, launcher=self.launcher)
        self.token = identity.new_token()
        with self.services.database.write() as connection:
            identity.add_key(connection, org="local", token=self.token, name="torture")
        self.app = create_app(values, services=self.services, reconcile=False)
        self.http = TestClient(self.app, raise_server_exceptions=False)
        self.reconciler = Reconciler(self.services)
        self.call("POST", "/api/environments/local/echo", content=archive({"environment.py": ENVIRONMENT}))

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}", **request.pop("headers", {})}
        answer: Any = self.http.request(method, path, headers=headers, **request)
        return answer

    def submit(self, *, key: str | None = None, **train: Any) -> str:
        config = {"model": "flash/nano", "environment": {"id": "local/echo"}, "train": train}
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.call("POST", "/api/runs", json={"config": config}, headers=headers)
        if not answer.is_success:
            raise from_wire(answer.json()["error"])
        return str(answer.json()["run_id"])

    def settle(self) -> None:
        for _ in range(30):
            if not self.reconciler.tick():
                return

    def state(self, run_id: str) -> RunState:
        with self.services.database.read() as connection:
            return runs.get_run(connection, run_id).state

    def worker(self, run_id: str, epoch: int) -> Worker:
        return Worker(self, runs.attempt_id(run_id, epoch), epoch)

    def close(self) -> None:
        self.services.close()


class Worker:
    """An attempt's side of the worker API; raises what the plane answers."""

    def __init__(self, plane: Plane, attempt_id: str, epoch: int) -> None:
        self._plane = plane
        self._token = plane.launcher.requests[attempt_id].token
        self.attempt_id = attempt_id
        self.epoch = epoch
        self.sent = 0

    def claim(self) -> int:
        """Takes the attempt; the step that it resumes after."""
        resume = self._post("claim", {"pid": 77, "device": "cpu"})["resume_from"]
        return int(resume["step"]) if resume else 0

    def beat(self, step: int) -> None:
        self._post("heartbeat", {"epoch": self.epoch, "phase": "training", "step": step, "progress": step})

    def tell(self, count: int) -> None:
        events = [
            {"n": self.sent + n, "time": 0.0, "kind": "log", "data": {"stream": "trainer", "text": f"line {n}"}}
            for n in range(1, count + 1)
        ]
        self._post("events", {"epoch": self.epoch, "events": events})
        self.sent += count  # only once it is acknowledged

    def report(self, step: int, final: bool, sha256: str) -> None:
        self._post("checkpoints", {"epoch": self.epoch, "step": step, "final": final, "manifest_sha256": sha256})

    def finish(self, outcome: str) -> None:
        self._post("finish", {"epoch": self.epoch, "outcome": outcome})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self._token}"}
        answer = self._plane.http.post(f"/worker/attempts/{self.attempt_id}/{path}", json=body, headers=headers)
        if answer.is_success:
            return answer.json() if answer.content else None
        raise from_wire(answer.json()["error"])
