"""The server process of one FLASH_HOME: `python -m flash.control_plane.main`.

Owns the socket, `server.json`, the log, and when the process ends: on SIGTERM or SIGINT, on request, or when
nothing has lived and no one has asked for a while; a run, an engine and a deployed name keep it. Port and token
are chosen once and kept, so that addresses last and workers and engines find a restarted server again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from flash import __version__
from flash.catalog.catalog import flash_home
from flash.control_plane.app import create_app
from flash.control_plane.services import Services, open_services
from flash.control_plane.settings import ServerSettings, load_settings
from flash.errors import FlashError, InvalidInput
from flash.launching.launcher import Launcher
from flash.storage import deployments, engines, identity, runs

log = logging.getLogger("flash.server")

LOCAL_KEY = "this machine"  # the name under which the laptop's own token is kept
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True)
class Address:
    port: int
    token: str


def read_address(path: Path) -> Address | None:
    """What an earlier server of this home left in `server.json`; None if there is nothing to keep."""
    try:
        found = json.loads(path.read_text())
        return Address(port=int(found["port"]), token=str(found["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_address(home: Path, address: Address, *, started_at: float) -> None:
    """`server.json`, and `token` with the token alone, for programs that take a key from a file."""
    value = {
        "port": address.port,
        "token": address.token,
        "pid": os.getpid(),
        "version": __version__,
        "started_at": started_at,
    }
    _write_private(home / "token", address.token + "\n")
    _write_private(home / "server.json", json.dumps(value))


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, readable by its owner only."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def bind(host: str, wanted: int, *, fixed: bool) -> socket.socket:
    """A listening-ready socket on the wanted port, or on any free one if another program has it."""
    last: OSError | None = None
    for port in (wanted,) if fixed else (wanted, 0):
        found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            found.close()
            last = error
        else:
            return found
    raise InvalidInput(f"{host}:{wanted} can't be used: {last}", remedy="set another port, or 0 for any")


class Activity:
    """ASGI middleware that knows when someone last asked, and whether anyone is still being answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self._last = time.monotonic()

    @property
    def idle_s(self) -> float:
        return 0.0 if self._open else time.monotonic() - self._last


class Server(uvicorn.Server):
    """uvicorn's server, which tells the world where it is once it listens, and leaves when idle or asked."""

    def __init__(self, config: uvicorn.Config, plane: Services, activity: Activity, address: Address) -> None:
        super().__init__(config)
        self._plane = plane
        self._activity = activity
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit:
            return
        write_address(self._plane.settings.home, self._address, started_at=time.time())
        log.info("listening on %s (pid %d, version %s)", self._plane.api_url, os.getpid(), __version__)
        self._watcher = asyncio.create_task(self._watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._plane.followers.close()  # event streams end by themselves; the time limit is for all else
        await super().shutdown(sockets)

    async def _watch(self) -> None:
        limit = self._plane.settings.idle_exit_s
        pause = min(0.1, limit / 4) if limit else 0.1
        while not self.should_exit:
            await asyncio.sleep(pause)
            if self._plane.stopping.is_set():
                log.info("asked to stop")
                self.should_exit = True
            elif limit and self._activity.idle_s >= limit and not await asyncio.to_thread(self._busy):
                log.info("idle for %g s: leaving", limit)
                self.should_exit = True

    def _busy(self) -> bool:
        with self._plane.database.read() as connection:
            return bool(
                runs.any_open(connection) or engines.live(connection) or deployments.count_live(connection)
            )


def serve(settings: ServerSettings, *, launcher: Launcher | None = None) -> None:
    """Runs the server of this home until it is told to end, or has been idle for long enough."""
    if settings.host not in LOOPBACK:
        raise InvalidInput(
            f"host = {settings.host!r}: this server has no keys but this machine's own",
            remedy="bind it to 127.0.0.1",
        )
    plane = open_services(settings, launcher=launcher)
    try:
        address_file = settings.home / "server.json"
        kept = read_address(address_file)
        listener = bind(settings.host, settings.port or (kept.port if kept else 0), fixed=bool(settings.port))
        address = Address(
            port=listener.getsockname()[1], token=kept.token if kept else identity.new_token()
        )
        plane.api_url = f"http://{settings.host}:{address.port}"
        with plane.database.write() as connection:
            identity.revoke_keys(connection, org=identity.LOCAL_ORG, name=LOCAL_KEY, keep=address.token)
            identity.add_key(connection, org=identity.LOCAL_ORG, token=address.token, name=LOCAL_KEY)
        activity = Activity(create_app(settings, services=plane))
        config = uvicorn.Config(
            activity,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=settings.graceful_shutdown_s,
            server_header=False,
        )
        # uvicorn raises a caught signal again at its end: that must not skip the closing below.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: plane.stopping.set())
        Server(config, plane, activity, address).run(sockets=[listener])
    finally:
        plane.close()
        log.info("ended")


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=10 << 20, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in ("alembic", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main(argv: list[str] | None = None) -> int:
    """Takes no arguments: FLASH_HOME and FLASH_SERVER_* say everything."""
    arguments: list[Any] = list(sys.argv[1:] if argv is None else argv)
    if arguments:
        print("error: the server takes no arguments; set FLASH_HOME and FLASH_SERVER_*", file=sys.stderr)
        return 2
    home = flash_home()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _log_to(home / "logs" / "server.log")
    try:
        serve(load_settings(home))
    except FlashError as error:
        log.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
