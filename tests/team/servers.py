"""Several real server processes on one Postgres and one home, behind a forwarder that leads to whichever lives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from torture.machine import ENVIRONMENT, SETTINGS, archive, wait_for

HELD_AT = 50
COMMAND = (sys.executable, "-m", "flash.cli.main", "server", "start", "--config")


def holding(home: Path) -> dict[str, str]:
    """Variables of a worker whose run is caught in the act by `Servers.begun`."""
    return {"FLASH_FAILPOINTS": f"trainer.step:{HELD_AT}", "FLASH_FAILPOINTS_HOLD": str(home / "hold")}


class Forwarder:
    """A balancer in small: each connection goes to the first port that takes it."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                incoming, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(incoming,), daemon=True).start()

    def _serve(self, incoming: socket.socket) -> None:
        for port in list(self.ports):
            with contextlib.suppress(OSError):
                outgoing = socket.create_connection(("127.0.0.1", port), timeout=2)
                outgoing.settimeout(None)
                break
        else:
            incoming.close()
            return
        back = threading.Thread(target=_pump, args=(outgoing, incoming), daemon=True)
        back.start()
        _pump(incoming, outgoing)
        back.join()
        incoming.close()
        outgoing.close()

    def close(self) -> None:
        self._listener.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Servers:
    """`start` gives a server's number; `http(number)` asks that one, `http()` whichever lives."""

    def __init__(self, home: Path, backing: dict[str, str], **settings: str) -> None:
        self.home = home
        self.forwarder = Forwarder()
        home.mkdir(parents=True)
        self._config = home / "server.toml"
        self._config.write_text(f'home = "."\nworker_url = "{self.forwarder.url}"\n')
        hidden = ("FLASH_", "FREESOLO_", "WANDB_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        own = {"FLASH_SERVER_LEADER_LEASE_S": "4", **holding(home)}
        self._variables = {**kept, **SETTINGS, **backing, **own, **settings}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []

    def start(self) -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with (self.home / "server.out").open("ab") as output:
            process = subprocess.Popen(
                [*COMMAND, str(self._config)], env={**self._variables, "FLASH_SERVER_PORT": str(port)},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        self.ports.append(port)

        def ready() -> bool:
            assert process.poll() is None, (self.home / "server.out").read_text()[-2000:]
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"http://127.0.0.1:{port}/api/ready", trust_env=False).status_code == 200
            return False

        wait_for(ready)
        self.forwarder.ports.append(port)
        return len(self.processes) - 1

    def http(self, number: int | None = None) -> httpx.Client:
        url = self.forwarder.url if number is None else f"http://127.0.0.1:{self.ports[number]}"
        headers = {"Authorization": f"Bearer {(self.home / 'token').read_text().strip()}"}
        return httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60)

    def call(self, method: str, path: str, number: int | None = None, **request: Any) -> Any:
        with self.http(number) as http:
            answer = http.request(method, path, **request)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def leader(self) -> int | None:
        """Which one says that it leads; None: nobody, or more than one."""
        leading = []
        for number, process in enumerate(self.processes):
            if process.poll() is None and psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                with contextlib.suppress(httpx.HTTPError), self.http(number) as http:
                    if "flash_server_leads 1" in http.get("/metrics").text:
                        leading.append(number)
        return leading[0] if len(leading) == 1 else None

    def wait_for_leader(self, other_than: int | None = None) -> int:
        try:
            found: list[int] = wait_for(
                lambda: [number] if (number := self.leader()) is not None and number != other_than else []
            )
        except TimeoutError as error:
            ends = [process.poll() for process in self.processes]
            said = (self.home / "server.out").read_text()[-3000:]
            raise AssertionError(f"nobody leads but {self.leader()}; ends {ends}; {said}") from error
        return found[0]

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait(30)
        self.forwarder.ports.remove(self.ports[number])

    def push(self) -> None:
        self.call("POST", "/api/environments/local/echo", content=archive({"environment.py": ENVIRONMENT}))

    def submit(self, train: dict[str, Any]) -> str:
        config = {"model": "flash/nano", "environment": {"id": "local/echo"}, "train": train}
        return str(self.call("POST", "/api/runs", json={"config": config})["run_id"])

    def status(self, run_id: str) -> dict[str, Any] | None:
        """None while nobody can answer."""
        with contextlib.suppress(httpx.HTTPError), self.http() as http:
            answer = http.get(f"/api/runs/{run_id}")
            return dict(answer.json()) if answer.is_success else None
        return None

    def begun(self, train: dict[str, Any]) -> str:
        """A run with a checkpoint whose first attempt waits at a step in the middle until `go_on`."""
        (self.home / "hold").touch()
        run_id = self.submit(train)
        wait_for(lambda: (status := self.status(run_id)) and status["step"] == HELD_AT and status["checkpoints"])
        return run_id

    def go_on(self) -> None:
        (self.home / "hold").unlink()

    def ended(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = wait_for(
            lambda: status if (status := self.status(run_id)) and status["finished_at"] else None, 400
        )
        return found

    def adapter(self, run_id: str) -> str:
        files = self.call("GET", f"/api/runs/{run_id}/adapter")["files"]
        return next(str(file["sha256"]) for file in files if file["path"].endswith(".safetensors"))

    def events(self, run_id: str) -> Iterator[dict[str, Any]]:
        after, path = 0, f"/api/runs/{run_id}/events"
        while page := self.call("GET", path, params={"after": after, "limit": 10_000})["events"]:
            yield from page
            after = page[-1]["seq"]

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(30)
        self.forwarder.close()
        for process in psutil.process_iter():  # workers of this home
            with contextlib.suppress(psutil.Error):
                if str(self.home) in process.cwd() and process.pid != os.getpid():
                    process.kill()


def follow(client: httpx.Client, run_id: str, seqs: list[int]) -> None:
    """Reads a run's stream to its end, from whichever server this client asks."""
    with client, client.stream("GET", f"/api/runs/{run_id}/events/stream", timeout=None) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                seqs.append(json.loads(line.removeprefix("data:"))["seq"])
