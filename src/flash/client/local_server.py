"""The local server: finding it, starting exactly one, stopping it.

Owns the reading of `$FLASH_HOME/server.json`, which the server writes, and the lock under which CLIs start
one. Knows nothing of what the server serves beyond its health, its stop, and whether runs are under way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from flash import __version__
from flash.client.client import FlashClient
from flash.errors import FlashError, Unavailable

SERVER_MODULE = "flash.control_plane.main"
START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
HEALTH_TIMEOUT_S = 3.0
POLL_S = 0.05


@dataclass(frozen=True)
class LocalServer:
    """A local server's address, token and process, as it wrote them into `server.json`.

    `config`: the file that a team's server was started with; only its operator starts it again.
    """

    base_url: str
    token: str
    pid: int
    version: str
    config: str | None = None

    def client(self) -> FlashClient:
        return FlashClient(self.base_url, self.token, retry_delays_s=())


@dataclass(frozen=True)
class Health:
    version: str
    pid: int
    sqlite_version: str


def recorded(home: Path) -> LocalServer | None:
    """What `server.json` says, true or stale; None when there is none (or half of one)."""
    try:
        found = json.loads((home / "server.json").read_text())
        port = int(found["port"])
        host = str(found.get("host") or "127.0.0.1")
        return LocalServer(
            base_url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
            token=str(found["token"]),
            pid=int(found["pid"]),
            version=str(found["version"]),
            config=found.get("config"),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def health(server: LocalServer) -> Health | None:
    """The server's own word, or None when nothing, or some other program, answers at its address."""
    try:
        # Plain HTTP: there is no certificate to verify, and reading those of the machine takes 40 ms.
        with httpx.Client(timeout=HEALTH_TIMEOUT_S, trust_env=False, verify=False) as http:
            answer = http.get(f"{server.base_url}/api/health").json()
        said = Health(
            version=str(answer["version"]),
            pid=int(answer["pid"]),
            sqlite_version=str(answer["sqlite_version"]),
        )
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return said if said.pid == server.pid else None


def running(home: Path) -> tuple[LocalServer, Health] | None:
    """The server that lives now, or None; never starts one."""
    server = recorded(home)
    if server is None or not _is_server(server.pid):
        return None
    said = health(server)
    return (server, said) if said else None


def ensure(home: Path, *, notice: Callable[[str], None] = lambda text: None) -> LocalServer:
    """The local server, started if need be; however many callers come at once, one is started.

    A server of another version is replaced when no run is under way; otherwise it is used and `notice` told.
    Raises `Unavailable` with the log's last line when no server comes up within `START_LIMIT_S`.
    """
    found = running(home)
    if found and (found[1].version == __version__ or found[0].config):
        return found[0]
    home.mkdir(parents=True, exist_ok=True)
    with _start_lock(home):
        found = running(home)
        if found and found[1].version != __version__:
            found = _replace_if_idle(home, found[0], found[1].version, notice)
        return found[0] if found else _start(home)


def stop(home: Path) -> int | None:
    """Stops the local server and waits until its process is gone; returns its pid, or None if none ran."""
    server = recorded(home)
    if server is None or not _is_server(server.pid):
        return None
    process = _process(server.pid)
    try:
        with server.client() as client:
            client.stop_server()
    except FlashError:
        _signal(process, kill=False)  # it lives but does not answer
    if not _wait_gone(process, STOP_LIMIT_S):
        _signal(process, kill=True)
        if not _wait_gone(process, STOP_LIMIT_S):
            raise Unavailable(f"the local server (pid {server.pid}) does not end", remedy="end it by hand")
    return server.pid


def log_path(home: Path) -> Path:
    return home / "logs" / "server.log"


@contextlib.contextmanager
def _start_lock(home: Path) -> Iterator[None]:
    """Held by the one CLI that starts or replaces the server; the kernel drops it if that CLI dies."""
    deadline = time.monotonic() + START_LIMIT_S + STOP_LIMIT_S
    with (home / "server.start.lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Unavailable(
                        "another flash command has been starting the local server for too long",
                        remedy=f"see {log_path(home)}",
                    ) from None
                time.sleep(POLL_S)
        yield


def _start(home: Path) -> LocalServer:
    before = recorded(home)
    if before is not None and before.config:
        raise Unavailable(
            f"{home} is the home of a team's server, which does not run",
            remedy=f"flash server start --config {before.config}, or name another server: flash login",
        )
    log = log_path(home)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", SERVER_MODULE],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=home,
            env={**os.environ, "FLASH_HOME": str(home)},
            start_new_session=True,  # a Ctrl-C meant for the CLI must not reach the server
        )
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        found = running(home)
        if found:
            return found[0]
        if process.poll() is not None:
            # Another one may have won outside this lock, e.g. `flash server start` in the foreground.
            found = running(home)
            if found:
                return found[0]
            raise Unavailable(
                f"the local server did not start (exit {process.returncode}): {_last_line(log)}",
                remedy=f"see {log}",
            )
        time.sleep(POLL_S)
    process.terminate()
    raise Unavailable(f"the local server did not answer within {START_LIMIT_S:.0f} s", remedy=f"see {log}")


def _replace_if_idle(
    home: Path, server: LocalServer, version: str, notice: Callable[[str], None]
) -> tuple[LocalServer, Health] | None:
    """None once the old server is gone; the old server itself while it is busy."""
    busy = _runs_under_way(server)
    if busy == 0:
        stop(home)
        return None
    what = "it could not say whether runs are under way" if busy is None else f"{busy} run(s) under way"
    notice(
        f"the local server is version {version}, this is {__version__}; {what}, so it stays "
        "(to replace it: flash server stop)"
    )
    return running(home)


def _runs_under_way(server: LocalServer) -> int | None:
    try:
        with server.client() as client:
            return sum(not run.state.terminal for run in client.runs(limit=200))
    except FlashError:
        return None


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _is_server(pid: int) -> bool:
    """Whether `pid` lives and is a Flash server: a stale file may name what is another program's pid now."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and SERVER_MODULE in process.cmdline()
    except (psutil.Error, ValueError, OverflowError):  # a damaged file may name any number
        return False


def _signal(process: psutil.Process | None, *, kill: bool) -> None:
    with contextlib.suppress(psutil.Error):
        if process is not None:
            process.kill() if kill else process.terminate()


def _wait_gone(process: psutil.Process | None, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"
