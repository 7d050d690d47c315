"""Serving in a test: hellos, adapters in a real store, clients of a running host."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from flash.artifacts.manifests import manifest_key, write_checkpoint
from flash.artifacts.store import Store
from flash.catalog.catalog import load_catalog
from flash.inference.scripted_engine import ScriptedEngine
from flash.serving.app import Room
from flash.serving.hello import ADAPTER_HEADER, MANIFEST_HEADER, EngineHello, adapter_digest

PATIENCE_S = 90.0
TOKEN = "engine-token-of-many-characters"
RUN_ID = "flash-1700000000-0000abcd"


def hello(folder: Path, **changes: Any) -> EngineHello:
    entry = load_catalog().get("flash/nano")
    return EngineHello(
        **{
            "engine_id": "engine-1",
            "plane_url": "http://127.0.0.1:9",
            "token": TOKEN,
            "model": entry.id,
            "source": str(entry.source),
            "device": "cpu",
            "work_dir": str(folder / "work"),
            "store_url": (folder / "artifacts").as_uri(),
            "cache_dir": str(folder / "cache"),
            "heartbeat_s": 0.2,
            "lease_s": 60.0,
            "idle_s": 0.0,
            "max_rows": 32,
            "max_waiting": 64,
            "cache_bytes": 64 << 20,
            "max_adapters": 8,
            "threads": 1,
            **changes,
        }
    )


@dataclass(frozen=True)
class Stored:
    """An adapter in the store, as the control plane would name it."""

    digest: str
    manifest_key: str

    @property
    def headers(self) -> dict[str, str]:
        return {ADAPTER_HEADER: self.digest, MANIFEST_HEADER: self.manifest_key}


def put_adapter(store: Store, folder: Path, step: int) -> Stored:
    """Uploads `folder`, which holds `adapter/`, as a checkpoint."""
    manifest, _ = write_checkpoint(store, RUN_ID, step, folder, False, {})
    return Stored(adapter_digest(manifest), manifest_key(RUN_ID, step))


def made_up_adapter(store: Store, folder: Path, step: int, *, thinking: bool = False) -> Stored:
    """An adapter's files for engines that don't read them."""
    place = folder / f"made-up-{step}"
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "adapter_model.safetensors").write_bytes(random.Random(step).randbytes(2000))
    (place / "adapter" / "flash.json").write_text(json.dumps({"spec": {"thinking": thinking}}))
    return put_adapter(store, place, step)


class Site:
    """A running host's address, and clients for it."""

    def __init__(self, url: str) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)

    def openai(self, headers: dict[str, str] | None = None, **options: Any) -> openai.OpenAI:
        settings = {"max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, default_headers=headers, **settings)

    def refused(self, path: str, body: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> Any:
        """The error's fields of a request that must fail with `status`."""
        answer = self.http.post(path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def sums(self) -> dict[str, float]:
        """The metrics page by name, labels left out."""
        sums: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                sums[name.partition("{")[0]] = sums.get(name.partition("{")[0], 0.0) + float(value)
        return sums


@dataclass
class Scripted(Site):
    room: Room
    engine: ScriptedEngine
    store: Store
    tokenizer: Any

    def __init__(self, url: str, room: Room, engine: ScriptedEngine, store: Store, tokenizer: Any) -> None:
        super().__init__(url)
        self.room, self.engine, self.store, self.tokenizer = room, engine, store, tokenizer


@contextmanager
def running(app_of: Callable[[], Any]) -> Iterator[str]:
    """An application on a port of its own, in a thread with its own event loop; made inside that loop."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        config = uvicorn.Config(app_of(), log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        servers.append(uvicorn.Server(config))
        serving = asyncio.create_task(servers[0].serve(sockets=[listening]))
        while not servers[0].started:
            await asyncio.sleep(0.01)
        started.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join()


# --- a host's process, and its plane ---

class Plane:
    """Answers heartbeats as it is told to, and keeps them."""

    def __init__(self) -> None:
        self.beats: list[dict[str, Any]] = []
        self.desired = "serve"
        self.status = 200
        self.changed = threading.Condition()
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                beat = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = self.headers["Authorization"] == f"Bearer {TOKEN}"
                with plane.changed:
                    plane.beats.append({**beat, "path": self.path})
                    plane.changed.notify_all()
                body = json.dumps({"desired": plane.desired}).encode()
                self.send_response(plane.status if known else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def states(self) -> list[str]:
        """The states as they followed each other."""
        states = [beat["state"] for beat in self.beats]
        return [state for place, state in enumerate(states) if place == 0 or states[place - 1] != state]

    def wait_for(self, condition) -> dict[str, Any]:
        """The first heartbeat that fits."""

        def found() -> dict[str, Any] | None:
            return next((beat for beat in self.beats if condition(beat)), None)

        def failed() -> dict[str, Any] | None:
            return next((beat["error"] for beat in self.beats if beat["state"] == "failed"), None)

        with self.changed:
            self.changed.wait_for(lambda: found() or failed(), PATIENCE_S)
            assert found(), (self.states, failed())
            return found()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def process(told: EngineHello | None) -> Iterator[subprocess.Popen]:
    """A host process; it is dead afterwards."""
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", "flash.serving.host"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        started.stdin.write(b"{}\n" if told is None else told.model_dump_json().encode() + b"\n")
        started.stdin.flush()
        yield started
    finally:
        started.kill()
        started.wait()


def ended(host: subprocess.Popen) -> tuple[int, str]:
    """Exit status and what it said on standard error."""
    _, said = host.communicate(timeout=PATIENCE_S)
    return host.returncode, said.decode()


class Host(Site):
    def __init__(self, url: str, plane: Plane, started: subprocess.Popen) -> None:
        super().__init__(url)
        self.plane, self.process = plane, started
