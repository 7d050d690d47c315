"""A server in this process whose engines' hosts are scripted processes (`scripted_host.py`), over real HTTP."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from flash.artifacts.manifests import write_checkpoint
from flash.control_plane.app import create_app
from flash.control_plane.services import Services, open_services
from flash.control_plane.settings import ServerSettings
from flash.launching.local import LocalLauncher
from flash.records import RunState
from flash.storage import engines, identity, runs

HOST = (sys.executable, "-P", str(Path(__file__).with_name("scripted_host.py")))
QUICK: dict[str, Any] = {
    "heartbeat_s": 0.1, "lease_s": 20.0, "reconcile_interval_s": 0.05, "engine_wait_s": 30.0, "stream_poll_s": 0.2,
}  # fmt: skip


def until(holds: Callable[[], Any], limit_s: float = 40) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)
    return found


class Service:
    """A server in this process on a port of its own; `again` is the same home under a new one."""

    def __init__(self, home: Path, *, token: str | None = None, port: int = 0, **settings: Any) -> None:
        self.home = home
        self.given = settings
        values = ServerSettings(home=home, **{**QUICK, **settings})
        launcher = LocalLauncher(home / "work", devices=["cpu"], engine_command=HOST)
        self.plane: Services = open_services(values, launcher=launcher)
        self.token = token or identity.new_token()
        with self.plane.database.write() as connection:
            identity.add_key(connection, org="local", token=self.token, name="test")
        listener = socket.create_server(("127.0.0.1", port))
        self.port = int(listener.getsockname()[1])
        self.plane.api_url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            create_app(values, services=self.plane), log_config=None, lifespan="on", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.http = self.client(self.token)

    def client(self, token: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.plane.api_url, headers=headers, timeout=60, trust_env=False)

    def stop(self, *, kill: bool = False) -> None:
        """Ends the server; engines go on, unless `kill`."""
        self.http.close()
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        for handle in self.plane.launcher.list().values() if kill else ():
            self.plane.launcher.kill(handle)
        self.plane.close()

    def again(self) -> Service:
        self.stop()
        return Service(self.home, token=self.token, port=self.port, **self.given)

    # --- what a test looks at ---

    def run(self, *steps: int, final: bool = True, org: str = "local", model: str = "flash/nano") -> str:
        """A run that is over, with these checkpoints, the last of them final."""
        run_id = runs.new_run_id(time.time())
        saved = []
        for step in steps:
            folder = self.home / "saves" / run_id / str(step)
            (folder / "adapter").mkdir(parents=True)
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"%d" % step)
            saved.append(write_checkpoint(self.plane.store, run_id, step, folder, final and step == steps[-1], {}))
        new = runs.NewRun(
            org=org, config={}, spec={"model": model, "algorithm": "sft"}, seed=0,
            environment_namespace="local", environment_name="task", environment_sha256="ab" * 32,
        )  # fmt: skip
        end, now = RunState.DONE if final else RunState.CANCELLED, time.time()
        with self.plane.database.write() as connection:  # at once, or the server would start it
            identity.ensure_org(connection, org)
            runs.insert_run(connection, new, now=now, run_id=run_id)
            for manifest, sha256 in saved:
                runs.record_checkpoint(connection, manifest, epoch=1, manifest_sha256=sha256, now=now)
            runs.transition(connection, run_id, source=[RunState.QUEUED], target=end, reason="test", now=now)
        return run_id

    def deploy(self, run_id: str, step: int | None = None, **fields: Any) -> httpx.Response:
        return self.http.post("/api/deployments", json={"run_id": run_id, "step": step, **fields})

    def live(self, run_id: str, step: int | None = None) -> dict[str, Any]:
        answer = self.deploy(run_id, step)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def chat(self, model: str, text: str = "hello there", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def stream(self, model: str, text: str) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
        return self.http.stream("POST", "/v1/chat/completions", json=body)

    def engines(self) -> list[engines.EngineRow]:
        with self.plane.database.read() as connection:
            return engines.live(connection)

    def asked(self) -> list[dict[str, Any]]:
        """What hosts were asked, oldest first."""
        logs = sorted(self.home.glob("work/engines/*/asked.jsonl"), key=lambda path: path.stat().st_ctime)
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]
