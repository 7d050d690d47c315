"""Workers as child processes of this machine: supervisors of attempts and hosts of engines.

Owns starting, recognising and killing process trees. A worker is known by its pid and start time, so a pid
that the system gave to another program is never taken for it, and by a mark in its environment (the attempt's
id, no secret) that its descendants inherit: they are found even when their supervisor is gone. Supervisors are
forked from a preloaded process where there is one (`preload`), and differ in nothing from others. What is the
server's alone among its variables is kept from them. A note for each living worker lies in `.live/`, from which a
restarted server finds its workers again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil

from flash.errors import Unavailable
from flash.failpoints import MARK as MARK  # launchers mark what they start
from flash.launching.hardware import local_devices
from flash.launching.launcher import LaunchRequest, Probe
from flash.launching.preload import Preloaded

SUPERVISOR = (sys.executable, "-P", "-m", "flash.worker.supervisor")
ENGINE_HOST = (sys.executable, "-P", "-m", "flash.serving.host")
# These have a way of their own into a worker (its claim), or none at all.
WITHHELD = ("FREESOLO_API_KEY", "WANDB_API_KEY", "GITHUB_TOKEN", "FLASH_API_URL", "PGPASSWORD")
_SETTINGS = "FLASH_SERVER_"  # the server's own: its database's URL, its bucket's and its cluster's keys
_PROVIDERS = ("AWS_", "AZURE_", "GOOGLE_")  # where obstore finds what a store's options leave out


class LocalLauncher:
    """`work_root` is `$FLASH_HOME/work`; workers live in folders of their own below it."""

    def __init__(
        self,
        work_root: Path,
        *,
        devices: Sequence[str] | None = None,
        command: Sequence[str] = SUPERVISOR,
        engine_command: Sequence[str] = ENGINE_HOST,
        preloaded: Preloaded | None = None,
        store_keys: bool = True,
    ) -> None:
        self._root = work_root
        self._store_keys = store_keys  # whether workers reach a bucket as the server does, by the provider's variables
        self._command = tuple(command)
        self._engine_command = tuple(engine_command)
        self._preloaded = preloaded  # forks supervisors; without one, or when it can't, they are started afresh
        self._devices = None if devices is None else list(devices)
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # by handle: ours to reap
        self._attempts: dict[str, str] = {}  # attempt id by handle
        self._lock = threading.Lock()

    def devices(self) -> list[str]:
        if self._devices is None:
            self._devices = [found.name for found in local_devices()]
        return list(self._devices)

    def describe(self) -> None:
        return None

    def launch(self, request: LaunchRequest) -> str:
        with self._lock:
            found = self._find(request.attempt_id)
            if found is not None:
                return found
            return self._start(request)

    def _start(self, request: LaunchRequest) -> str:
        work_dir = Path(request.work_dir)
        try:
            work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (work_dir / ("supervisor.log" if request.engine is None else "host.log")).open("ab") as log:
                handle, words, told = self._fork(request, log) or self._spawn(request, log)
            with words:
                self._attempts[handle] = request.attempt_id
                _write_json(self._note(request.attempt_id), {"attempt_id": request.attempt_id, "handle": handle})
                hello = request.hello("cuda:0" if request.device.startswith("cuda:") else request.device)
                with contextlib.suppress(BrokenPipeError):  # it died at once: the next probe tells
                    words.write(told + json.dumps(hello).encode() + b"\n")
                    words.close()
        except OSError as error:
            raise Unavailable(f"the worker can't be started: {error}") from error
        return handle

    def _spawn(self, request: LaunchRequest, log: IO[bytes]) -> tuple[str, IO[bytes], bytes]:
        """A worker started afresh: its handle, its standard input, and what it must read there before its hello, which
        is nothing."""
        child = subprocess.Popen(
            self._command if request.engine is None else self._engine_command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=request.work_dir,
            env=self._environment(request),
            start_new_session=True,
        )
        assert child.stdin is not None
        handle = f"{child.pid}:{_start_time(child.pid)}"
        self._children[handle] = child
        return handle, child.stdin, b""

    def _fork(self, request: LaunchRequest, log: IO[bytes]) -> tuple[str, IO[bytes], bytes] | None:
        """The same of a supervisor that is forked, and waits for its variables and its folder; None: there is none."""
        if self._preloaded is None or request.engine is not None:
            return None
        read, write = os.pipe()
        words = os.fdopen(write, "wb")
        with os.fdopen(read, "rb") as stdin:
            pid = self._preloaded.fork(stdin.fileno(), log.fileno())
        if pid is not None:
            told = {"environ": self._environment(request), "cwd": request.work_dir}
            with contextlib.suppress(psutil.Error):  # killed already
                return f"{pid}:{_start_time(pid)}", words, json.dumps(told).encode() + b"\n"
        words.close()  # a fork that there is after all, too late to be heard of, is told nothing, and leaves
        return None

    def probe(self, handle: str) -> Probe:
        """Dead only when the supervisor and everything it started are gone."""
        self._reap(handle)
        if _supervisor(handle) is not None or any(True for _ in self._leftovers(handle)):
            return Probe.ALIVE
        self._forget(handle)
        return Probe.DEAD

    def kill(self, handle: str) -> None:
        supervisor = _supervisor(handle)
        tree: dict[int, psutil.Process] = {}
        if supervisor is not None:
            # Stopped first, so that it can start nothing between the listing and the kill.
            with contextlib.suppress(psutil.Error):
                supervisor.suspend()
            tree[supervisor.pid] = supervisor
            with contextlib.suppress(psutil.Error):
                tree |= {child.pid: child for child in supervisor.children(recursive=True)}
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(supervisor.pid) == supervisor.pid:
                    os.killpg(supervisor.pid, signal.SIGKILL)
        tree |= {process.pid: process for process in self._leftovers(handle)}
        for process in tree.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._reap(handle)

    def list(self) -> dict[str, str]:
        """Live attempts by their notes; those of dead ones are removed on the way."""
        found: dict[str, str] = {}
        for file in (self._root / ".live").glob("*.json"):
            entry = _read_json(file)
            if entry is None:
                continue
            self._attempts.setdefault(entry["handle"], entry["attempt_id"])
            if self.probe(entry["handle"]) is Probe.ALIVE:
                found[entry["attempt_id"]] = entry["handle"]
            else:
                file.unlink(missing_ok=True)
        return found

    def _note(self, attempt_id: str) -> Path:
        return self._root / ".live" / f"{attempt_id}.json"

    def _find(self, attempt_id: str) -> str | None:
        entry = _read_json(self._note(attempt_id))
        if entry is None or entry["attempt_id"] != attempt_id:
            return None
        self._attempts.setdefault(entry["handle"], attempt_id)
        return entry["handle"] if self.probe(entry["handle"]) is Probe.ALIVE else None

    def _leftovers(self, handle: str) -> Iterator[psutil.Process]:
        """Living processes of the attempt other than its supervisor: by session, or by their mark."""
        leader = _parse(handle)[0]
        attempt = self._attempt_of(handle)
        for process in psutil.process_iter():
            if process.pid in (leader, os.getpid()):
                continue
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                marked = attempt is not None and process.environ().get(MARK) == attempt
            except psutil.AccessDenied:
                marked = False
            except psutil.Error:
                continue
            if marked:
                yield process

    def _environment(self, request: LaunchRequest) -> dict[str, str]:
        """The server's, without what is its own, with the attempt's mark and its own device alone in sight."""
        withheld = (_SETTINGS,) if self._store_keys else (_SETTINGS, *_PROVIDERS)
        kept = {
            name: value for name, value in os.environ.items() if name not in WITHHELD and not name.startswith(withheld)
        }
        visible = request.device.removeprefix("cuda:") if request.device.startswith("cuda:") else ""
        own = {MARK: request.attempt_id, "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
        return {**kept, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **own}

    def _attempt_of(self, handle: str) -> str | None:
        if handle not in self._attempts:
            for file in (self._root / ".live").glob("*.json"):
                entry = _read_json(file)
                if entry is not None:
                    self._attempts.setdefault(entry["handle"], entry["attempt_id"])
        return self._attempts.get(handle)

    def _reap(self, handle: str) -> None:
        child = self._children.get(handle)
        if child is not None:
            child.poll()

    def _forget(self, handle: str) -> None:
        self._children.pop(handle, None)
        self._attempts.pop(handle, None)


def _parse(handle: str) -> tuple[int, str]:
    pid, _, started = handle.partition(":")
    return (int(pid) if pid.isdigit() else -1), started


def _start_time(pid: int) -> str:
    """When the process started, in a form that no change of the wall clock moves: ticks of this boot on Linux."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{after_name[19]}-{boot}"  # field 22 of the file: the name may hold spaces, so count from its end
    except (OSError, IndexError):
        return f"{psutil.Process(pid).create_time():.2f}"


def _supervisor(handle: str) -> psutil.Process | None:
    """The process of this handle if it lives; a zombie, or a later process of the same pid, does not count."""
    pid, started = _parse(handle)
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE or _start_time(pid) != started:
            return None
    except (psutil.Error, ValueError):
        return None
    return process


def _write_json(path: Path, value: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(value))
    draft.rename(path)


def _read_json(path: Path) -> dict[str, str] | None:
    try:
        entry = json.loads(path.read_text())
        return {"attempt_id": str(entry["attempt_id"]), "handle": str(entry["handle"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
