"""A laptop to torture: a home, a real server process on it, its HTTP API, and the processes of its attempts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from flash.failpoints import MARK

HERE = Path(__file__).parent
SERVER = (sys.executable, "-P", "-m", "flash.control_plane.main")
SCRIPTED_SERVER = (sys.executable, str(HERE / "scripted_server.py"))
SETTINGS = {
    "FLASH_SERVER_RECONCILE_INTERVAL_S": "0.2",  # each look walks the process table
    "FLASH_SERVER_HEARTBEAT_S": "0.25",
    "FLASH_SERVER_LEASE_S": "8",
    "FLASH_SERVER_BACKOFF_FIRST_S": "0.05",
    "FLASH_SERVER_BACKOFF_MAX_S": "0.1",
    "FLASH_SERVER_FRUITLESS_LIMIT": "100000",
    "FLASH_SERVER_ORPHAN_GRACE_S": "0.5",
    "FLASH_SERVER_IDLE_EXIT_S": "0",
    "FLASH_SERVER_DEVICES": "cpu",
    "FLASH_SERVER_PRELOAD": "false",  # so that each process of an attempt is known by its command line
    "FLASH_WORKER_SETTINGS": json.dumps(
        {"threads": 1, "event_interval_s": 0.02, "retry_first_s": 0.05, "retry_most_s": 0.3}
    ),
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT = '''
from freesolo.environments import EnvironmentSingleTurn, RewardResult

WORDS = ("red", "blue", "green", "grey")

class Echo(EnvironmentSingleTurn):
    """Says back the word it was given."""

    dataset = [{"input": f"Say {word}.", "output": word} for word in WORDS * 4]

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        return RewardResult(score=len(set(response) & set(example.output)) / 5)

def load_environment():
    return Echo()
'''


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def wait_for(holds: Callable[[], Any], limit_s: float = 180.0, pause_s: float = 0.05) -> Any:
    """What `holds` gives once it is true; TimeoutError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came of it in {limit_s:g} s")
        time.sleep(pause_s)
    return value


class Machine:
    """One FLASH_HOME. `start` and `kill` are for its server; attempts are left alone by both."""

    def __init__(self, home: Path, *, command: tuple[str, ...] = SERVER, **settings: str) -> None:
        self.home = home
        self._command = command
        self._settings = settings
        self._server: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client()

    def start(self, **settings: str) -> None:
        home = {"FLASH_HOME": str(self.home)}
        hidden = ("FLASH_", "FREESOLO_", "WANDB_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "server.out").open("ab") as output:
            self._server = subprocess.Popen(
                self._command,
                env={**kept, **home, **SETTINGS, **self._settings, **settings},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        found = wait_for(self._address, 180, 0.02)
        self.http.close()
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{found['port']}",
            headers={"Authorization": f"Bearer {found['token']}"},
            trust_env=False,
            timeout=30,
        )

    def _address(self) -> dict[str, Any] | None:
        assert self._server is not None
        if self._server.poll() is not None:
            raise RuntimeError(f"the server ended: {(self.home / 'server.out').read_text()[-500:]}")
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.home / "server.json").read_text())
            return found if found["pid"] == self._server.pid else None
        return None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                self._server.send_signal(number)
            self._server.wait(30)

    @property
    def dead(self) -> bool:
        return self._server is None or self._server.poll() is not None

    def call(self, method: str, path: str, **request: Any) -> Any:
        answer = self.http.request(method, path, **request)
        answer.raise_for_status()
        return answer.json()

    def push(self, source: str = ENVIRONMENT, name: str = "echo") -> None:
        self.call("POST", f"/api/environments/local/{name}", content=archive({"environment.py": source}))

    def submit(self, train: dict[str, Any], *, algorithm: str = "sft", key: str | None = None) -> str:
        config = {"model": "flash/nano", "algorithm": algorithm, "environment": {"id": "local/echo"}, "train": train}
        headers = {"Idempotency-Key": key} if key else {}
        return str(self.call("POST", "/api/runs", json={"config": config}, headers=headers)["run_id"])

    def status(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/api/runs/{run_id}")
        return found

    def ended(self, run_id: str, limit_s: float = 600.0) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = self.status(run_id)
            return found if found["state"] in ("done", "failed", "cancelled") else None

        found: dict[str, Any] = wait_for(look, limit_s, 0.1)
        return found

    def adapter_sha256(self, run_id: str) -> str:
        """Of the final adapter's weights."""
        files = self.call("GET", f"/api/runs/{run_id}/adapter")["files"]
        return next(str(file["sha256"]) for file in files if file["path"].endswith(".safetensors"))

    def events(self, run_id: str) -> Iterator[dict[str, Any]]:
        after = 0
        path = f"/api/runs/{run_id}/events"
        while page := self.call("GET", path, params={"after": after, "limit": 10_000})["events"]:
            yield from page
            after = page[-1]["seq"]

    def processes(self, run_id: str, kind: str | None = None) -> list[psutil.Process]:
        """Living processes of the run's attempts: all, or the supervisor, trainer or environment_host."""
        found = []
        for process in psutil.process_iter():
            try:
                own = process.environ().get(MARK, "").startswith(f"{run_id}.")
                if own and (kind is None or any(kind in part for part in process.cmdline())):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        """Ends the server and whatever lives with this home in its environment."""
        self.kill()
        self.http.close()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("FLASH_HOME") == str(self.home) and process.pid != os.getpid():
                    process.kill()
