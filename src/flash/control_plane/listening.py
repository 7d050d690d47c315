"""The server as a process: listens, says where, and ends in time.

Owns the socket, `server.json`, and when the process ends: on SIGTERM or SIGINT, on request, or when
nothing has lived and no one has asked for a while; a run, an engine and a deployed name keep it. Port and token
are chosen once and kept, so that addresses last and workers and engines find a restarted server again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from flash import __version__
from flash.control_plane.app import create_app
from flash.control_plane.services import Services, open_services
from flash.control_plane.settings import ServerSettings
from flash.errors import FlashError, InvalidInput, Unauthorized
from flash.launching.accounts import check_account
from flash.launching.launcher import Launcher
from flash.launching.preload import Preloaded
from flash.storage import audit, deployments, engines, identity, runs
from flash.storage.private_files import found_or_made, replace_file

log = logging.getLogger("flash.server")

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # an address to listen on, and one to reach it by


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


def write_address(home: Path, address: Address, *, host: str, config: Path | None, started_at: float) -> None:
    """`server.json`, and `token` with the token alone, for programs that take a key from a file."""
    value = {
        "host": host,
        "port": address.port,
        "token": address.token,
        "pid": os.getpid(),
        "version": __version__,
        "started_at": started_at,
        "config": str(config) if config else None,
    }
    replace_file(home / "token", f"{address.token}\n".encode())
    replace_file(home / "server.json", json.dumps(value).encode())


def machine_token(home: Path) -> str:
    """The home's own token, made if there is none; servers that start together on one home get the same."""
    return found_or_made(home / "token", f"{identity.new_token()}\n".encode()).decode().strip()


def bind(host: str, wanted: int, *, fixed: bool) -> socket.socket:
    """A listening-ready socket on the wanted port, or on any free one if another program has it."""
    last: OSError | None = None
    for port in (wanted,) if fixed else (wanted, 0):
        found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # asyncio sees to this only for sockets made otherwise; without it a stream's pieces wait for ACKs, 40 ms each
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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

    def __init__(
        self, config: uvicorn.Config, plane: Services, activity: Activity, address: Address, file: Path | None
    ) -> None:
        super().__init__(config)
        self._plane = plane
        self._activity = activity
        self._address = address
        self._file = file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit:
            return
        settings = self._plane.settings
        host = _EVERYWHERE.get(settings.host, settings.host)
        write_address(settings.home, self._address, host=host, config=self._file, started_at=time.time())
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
                await asyncio.sleep(self._plane.settings.stop_delay_s)  # not ready meanwhile, but still answering
                self.should_exit = True
            elif limit and self._activity.idle_s >= limit and not await asyncio.to_thread(self._busy):
                log.info("idle for %g s: leaving", limit)
                self.should_exit = True

    def _busy(self) -> bool:
        with self._plane.database.read() as connection:
            return bool(
                runs.any_open(connection) or engines.live(connection) or deployments.count_live(connection)
            )


def serve(
    settings: ServerSettings,
    *,
    config: Path | None = None,
    launcher: Launcher | None = None,
    preloaded: Preloaded | None = None,
) -> None:
    """Runs the server of this home until it is told to end, or has been idle for long enough."""
    if settings.host_user is not None:
        if settings.launcher == "local":  # else it is the nodes that start programs as them
            check_account(settings.host_user)
        settings.home.mkdir(parents=True, exist_ok=True)
        settings.home.chmod(0o700)  # whoever made it, and however: all below it is nobody else's
    plane = open_services(settings, launcher=launcher, preloaded=preloaded)
    try:
        kept = read_address(settings.home / "server.json")
        token = kept.token if kept else machine_token(settings.home)
        _let_in(plane, token)
        listener = bind(settings.host, settings.port or (kept.port if kept else 0), fixed=bool(settings.port))
        address = Address(port=listener.getsockname()[1], token=token)
        plane.api_url = settings.worker_url or _url(_EVERYWHERE.get(settings.host, settings.host), address.port)
        _greet(plane)
        activity = Activity(create_app(settings, services=plane))
        options = uvicorn.Config(
            activity,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=settings.graceful_shutdown_s,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
        )
        # uvicorn raises a caught signal again at its end: that must not skip the closing below.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: plane.stopping.set())
        Server(options, plane, activity, address, config).run(sockets=[listener])
    finally:
        plane.close()
        log.info("ended")


def _greet(plane: Services) -> None:
    """Asks the launcher once: one that refuses us will not think better of it, one that is away may come back."""
    try:
        plane.launcher.devices()
    except Unauthorized:
        raise
    except FlashError as error:
        log.warning("no worker can be started yet: %s", error)


def _let_in(plane: Services, token: str) -> None:
    """Gives this machine's own token its key; InvalidInput, on record, if a network could reach it and nobody else."""
    settings = plane.settings
    shared = plane.database.shared  # other machines have tokens of their own there
    name = f"{identity.MACHINE} ({socket.gethostname()} {settings.home})"[:200] if shared else identity.MACHINE
    with plane.database.write() as connection:
        identity.revoke_keys(connection, org=identity.LOCAL_ORG, name=name, keep=token)
        identity.add_key(connection, org=identity.LOCAL_ORG, token=token, name=name)
        if settings.host in LOOPBACK or identity.any_key(connection):
            return
        message = f"host = {settings.host!r}: nobody has a key to this server, so it listens to this machine only"
        entry = audit.Entry(
            "server start", InvalidInput.status, actor=audit.SERVER, object=settings.host, message=message
        )
        audit.record(connection, entry, now=plane.clock())
    raise InvalidInput(message, remedy="make one (flash admin key create --config FILE), or bind it to 127.0.0.1")


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
