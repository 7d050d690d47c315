"""An attempt in a test: a scripted control plane behind real HTTP, a real environment, a real supervisor process."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flash.config.load import parse_config
from flash.config.recipes import resolve

RUN_ID, EPOCH = "flash-1700000000-0000abcd", 1
TOKEN = "attempt-token-of-many-characters"
SECRET = "sk-canary-9f8e7d6c5b4a"

ENVIRONMENT = '''
import os
import time
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Sums(EnvironmentSingleTurn):
    dataset = [{"input": f"{a}+{a}=", "output": str(a + a)} for a in range(8)]

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        if response == "hang":
            time.sleep(60)
        return RewardResult(score=float(response.strip() == example.output))

def load_environment(**kwargs):
    print("environment loaded with", os.environ.get("SERVICE_KEY"))
    return Sums()
'''


@dataclass
class ScriptedPlane:
    """The worker API with a memory, and switches for what may go wrong."""

    store: Path
    environment: bytes
    spec: dict[str, Any]
    lease_s: float = 5.0
    heartbeat_s: float = 0.1
    desired: str = "run"
    secrets: dict[str, str] = field(default_factory=dict)
    resume_from: dict[str, Any] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    heartbeats: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    finish: dict[str, Any] | None = None
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str], int | None] = lambda route: None  # a status to answer instead, by route
    url: str = ""
    token: str = TOKEN

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append(route)
        if (status := self.fault(route)) is not None:
            return status, {"error": {"code": "conflict" if status == 409 else "unavailable", "message": "scripted"}}
        return getattr(self, f"_{route}")(body)

    def _claim(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {
            "run_id": RUN_ID, "epoch": EPOCH, "spec": self.spec, "secrets": self.secrets,
            "environment": {
                "namespace": "local", "name": "sums", "sha256": "0" * 64, "size": 1, "files": [], "created_at": 0.0,
            },
            "store_url": f"file://{self.store}", "work_dir": "", "resume_from": self.resume_from,
            "heartbeat_s": self.heartbeat_s, "lease_s": self.lease_s,
        }  # fmt: skip

    def _heartbeat(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.heartbeats.append(body)
        return 200, {"desired": self.desired, "lease_s": self.lease_s}

    def _events(self, body: dict[str, Any]) -> tuple[int, Any]:
        for event in body["events"]:
            if event["n"] > len(self.events):
                assert event["n"] == len(self.events) + 1, "a gap in the events"
                self.events.append(event)
        return 200, {"acknowledged": len(self.events)}

    def _checkpoints(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.checkpoints.append(body)
        return 204, None

    def _finish(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.finish = body
        return 204, None

    def _environment(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, self.environment

    # --- what tests set and ask ---

    def ship(self, source: str, **files: str) -> None:
        self.environment = archive({"environment.py": source, **files})

    def data(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event["kind"] == kind]

    def logged(self, stream: str | None = None) -> str:
        lines = (data["text"] for data in self.data("log") if stream in (None, data["stream"]))
        return "\n".join(lines)


def serve(plane: ScriptedPlane) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            if self.headers["Authorization"] != f"Bearer {plane.token}":
                status, answer = 401, {"error": {"code": "unauthorized", "message": "whose token is this?"}}
            else:
                status, answer = plane.answer(self.path.rsplit("/", 1)[1], body)
            payload = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A worker that was killed while it asked is no news here."""

    server = Server(("127.0.0.1", 0), Handler)
    plane.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def run_spec(**train: Any) -> dict[str, Any]:
    config, _ = parse_config(
        {
            "model": "flash/nano",
            "algorithm": "sft",
            "environment": {"id": "local/sums", "secrets": ["SERVICE_KEY"]},
            "train": train,
        }
    )
    return resolve(config, seed=0).model_dump(mode="json")


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ScriptedPlane]:
    scripted = ScriptedPlane(
        store=tmp_path / "store",
        environment=archive({"environment.py": ENVIRONMENT}),
        spec=run_spec(),
        secrets={"SERVICE_KEY": SECRET},
    )
    server = serve(scripted)
    yield scripted
    server.shutdown()
    server.server_close()


FAST = {
    "retry_first_s": 0.02, "retry_most_s": 0.1, "event_interval_s": 0.02, "stop_grace_s": 0.5,
    "preempt_grace_s": 0.5, "preempt_flush_s": 1.0, "exit_grace_s": 0.5, "upload_patience_s": 2.0,
    "claim_patience_s": 2.0, "download_patience_s": 1.0, "threads": 1,
}  # fmt: skip


class Attempt:
    """A supervisor process and the folder it works in."""

    def __init__(
        self, plane: ScriptedPlane, folder: Path, trainer: list[str] | None, without: str = "", **settings: float
    ) -> None:
        self.plane = plane
        self.work_dir = folder / "work"
        self.home = folder / "home"
        blocked = f"sys.modules[{without!r}] = None; " if without else ""  # as if it were not installed
        main = f"import sys; {blocked}from flash.worker.supervisor import main; main(trainer=sys.argv[1:])"
        command = ["-c", main, *trainer] if trainer else ["-m", "flash.worker.supervisor"]
        self.output = (folder / "supervisor.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=self.output,
            env={
                "PATH": os.environ["PATH"],
                "FLASH_HOME": str(self.home),
                "FLASH_WORKER_SETTINGS": json.dumps({**FAST, **settings}),
                "FLASH_OPERATOR_TOKEN": "operator-only",
                "DATABASE_PASSWORD": "operator-only",
                "HF_TOKEN": "hf_operators_own_token",
            },
            start_new_session=True,
        )
        start = {
            "api_url": plane.url, "attempt_id": f"{RUN_ID}.{EPOCH}", "token": plane.token,
            "work_dir": str(self.work_dir), "device": "cpu",
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(start).encode() + b"\n")
        self.process.stdin.close()

    def wait(self, timeout_s: float = 90) -> int:
        return self.process.wait(timeout_s)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def children(self) -> list[int]:
        """Living processes of this attempt beside its supervisor, by the folder that they work in."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    inside = str((entry / "cwd").readlink()).startswith(str(self.work_dir))
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                if inside and state != "Z":
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()


TRAINER_SCRIPT = Path(__file__).with_name("scripted_trainer.py")


@pytest.fixture
def attempt(plane: ScriptedPlane, tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    """Starts a supervisor with a scripted trainer (`attempt("hang")`), or with the real one (`attempt()`)."""
    started: list[Attempt] = []

    def start(script: str | None = None, *, folder: str = "", without: str = "", **settings: float) -> Attempt:
        trainer = [sys.executable, str(TRAINER_SCRIPT), script] if script else None
        (tmp_path / folder).mkdir(exist_ok=True)
        started.append(Attempt(plane, tmp_path / folder, trainer, without, **settings))
        return started[-1]

    yield start
    for one in started:
        one.end()


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Waits for a condition; the test fails if it doesn't come."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., Any]:
    return until


@pytest.fixture
def spec_of() -> Callable[..., dict[str, Any]]:
    """A resolved spec for `flash/nano` from keys of `[train]`."""
    return run_spec
