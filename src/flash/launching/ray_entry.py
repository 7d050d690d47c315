"""What a Ray job runs: it gets a worker's start line from the control plane, starts the worker, and outlives it.

`python -P -m flash.launching.ray_entry --kind attempt|engine --id ID --plane URL [--cpus N]`, with the ticket in
`FLASH_LAUNCH_TICKET`. Owns what is a node's own: the work folder (below `FLASH_HOME`, gone with the job, or with the
next one if this was killed), the device in sight, the address that an engine serves on, its vLLM. Its end means that no
process of the worker is left; so it ends them all when the worker ends, when Ray stops the job, and when the node's
raylet is gone, which Ray itself would leave them to survive. What the worker prints is the job's log.

Exit status: the worker's · 3 the ticket is refused · 4 the plane can't be reached · 75 the node's
raylet is gone · 143 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
import psutil

from flash.catalog.catalog import flash_home
from flash.client.engines import find_engine
from flash.launching.accounts import remove_quarters
from flash.launching.lineage import adopt_orphans, alive, ancestors, die_with
from flash.launching.local import ENGINE_HOST, MARK, SUPERVISOR, WITHHELD
from flash.launching.ray import NODE_GONE, TICKET

REFUSED, UNREACHABLE, STOPPED = 3, 4, 143
_SETTINGS = "FLASH_WORKER_SETTINGS"
_PATIENCE_S = 60.0  # for a control plane that is being restarted
_LOOK_S = 0.5
_FLUSH_S = 2.0  # for a worker that is asked to stop; Ray gives three seconds in all
_RAYLET = "raylet"
_HELD = ".entry"  # a work folder's file that is locked as long as its entry or its worker lives


class Entry:
    """One worker on this node: `command`, which reads its start line from standard input."""

    def __init__(self, command: Sequence[str], kind: str, worker_id: str, plane: str, cpus: int | None) -> None:
        self._command = tuple(command)
        self._kind = kind
        self._id = worker_id
        self._plane = plane
        self._cpus = cpus
        self._work_dir = flash_home() / "work" / worker_id
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = threading.Lock()

    def run(self, ticket: str) -> NoReturn:
        above = ancestors(up_to=_RAYLET)
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end_in_background(STOPPED))
        if above:  # by hand there is none
            threading.Thread(target=self._watch, args=(above,), daemon=True).start()
        hello = self._hello(ticket)
        remove_leftovers(self._work_dir.parent)
        self._child = self._worker(hello, _new_folder(self._work_dir))
        status = self._child.wait()
        self._end(status if status >= 0 else 128 - status)

    def _hello(self, ticket: str) -> dict[str, Any]:
        """The worker's start line, with this node's own folders and address in it."""
        deadline = time.monotonic() + _PATIENCE_S
        url, headers = f"{self._plane}/worker/launches/{self._id}/hello", {"Authorization": f"Bearer {ticket}"}
        while True:
            problem = ""
            try:
                answer = httpx.post(url, headers=headers, timeout=15, trust_env=False)
                if answer.is_success:
                    return self._here(answer.json())
                problem = f"{answer.status_code} {answer.text:.200}"
                if answer.status_code < 500 and answer.status_code != 429:
                    self._give_up(f"the control plane refuses {self._id}: {problem}", REFUSED)
            except (httpx.TransportError, ValueError) as error:
                problem = str(error) or type(error).__name__
            if time.monotonic() >= deadline:
                self._give_up(f"the control plane at {self._plane} can't be reached: {problem}", UNREACHABLE)
            time.sleep(1.0)

    def _here(self, hello: dict[str, Any]) -> dict[str, Any]:
        own = {**hello, "work_dir": str(self._work_dir)}
        if self._kind == "engine":
            own |= {"cache_dir": str(flash_home() / "cache"), "bind": _address_towards(self._plane)}
            own["threads"] = own["threads"] or self._cpus or 0
            own["vllm_python"] = _vllm_python(own["vllm_python"])
        return own

    def _worker(self, hello: dict[str, Any], held: int) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            cwd=self._work_dir,
            env=worker_environment(dict(os.environ), self._id, self._cpus),
            start_new_session=True,
            pass_fds=(held,),
            preexec_fn=lambda: die_with(parent),
        )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(hello).encode() + b"\n")
            child.stdin.close()
        return child

    def _watch(self, above: list[psutil.Process]) -> None:
        while all(alive(process) for process in above):
            time.sleep(_LOOK_S)
        self._end(NODE_GONE)

    def _end_in_background(self, status: int) -> None:
        """From a signal handler: the main thread may be anywhere."""
        threading.Thread(target=self._end, args=(status, _FLUSH_S), daemon=True).start()

    def _give_up(self, words: str, status: int) -> NoReturn:
        print(words, file=sys.stderr, flush=True)
        self._end(status)

    def _end(self, status: int, patience_s: float = 0.0) -> NoReturn:
        """Only when nothing of the worker is left, unless it can't be killed. With patience it is asked first, so
        that it brings away what it has."""
        self._ending.acquire()  # whoever comes later waits for the exit
        if self._child is not None and patience_s:
            self._child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(patience_s)
        deadline = time.monotonic() + 10
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=0.5)
        shutil.rmtree(self._work_dir, ignore_errors=True)
        remove_quarters(self._id)
        sys.stderr.flush()
        os._exit(status)


def remove_leftovers(root: Path) -> None:
    """Folders of entries below `root` that were killed, and of whose workers nothing lives."""
    for file in root.glob(f"*/{_HELD}"):
        with contextlib.suppress(OSError), file.open() as held:  # a lock that someone holds is an error, too
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)
            remove_quarters(file.parent.name)


def _new_folder(folder: Path) -> int:
    """Makes it, empty; gives the descriptor that holds it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    draft = folder / f"{_HELD}.draft"
    held = os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    draft.rename(folder / _HELD)  # only now, when it is locked, is it one that others look at
    return held


def _vllm_python(wish: str | None) -> str | None:
    """vLLM's interpreter on this node, if `wish` is "auto" or "vllm". Of one that has to be there and is not, the
    engine's host tells where it was looked for."""
    if wish is None:
        return None
    found = find_engine(flash_home())
    missing = str(flash_home() / "engines" / "vllm" / "bin" / "python") if wish == "vllm" else None
    return missing if found is None else str(found.python)


def worker_environment(inherited: dict[str, str], worker_id: str, cpus: int | None) -> dict[str, str]:
    """The node's, without the cluster's own variables (its token among them) and with one device in sight.

    `cpus`: of a slot without a GPU. On a GPU it is Ray that says which one, in CUDA_VISIBLE_DEVICES.
    """
    withheld = (*WITHHELD, TICKET, "OMP_NUM_THREADS", "PYTHONBREAKPOINT")  # the last two are Ray's doing
    kept = {name: value for name, value in inherited.items() if name not in withheld and not name.startswith("RAY_")}
    own = {MARK: worker_id, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONUNBUFFERED": "1"}
    if cpus:
        own |= {"CUDA_VISIBLE_DEVICES": "", _SETTINGS: _with_threads(kept.get(_SETTINGS), cpus)}
    return {**kept, **own}


def _with_threads(settings: str | None, cpus: int) -> str:
    """As many threads as the slot has CPUs, where the operator has not said."""
    try:
        given = json.loads(settings or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        return settings or ""  # the worker says what is wrong with it
    return json.dumps({"threads": cpus, **given})


def _address_towards(url: str) -> str:
    """This node's address on its way to that URL's host. Nothing is sent."""
    parts = urlsplit(url)
    family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


COMMANDS: Mapping[str, Sequence[str]] = {"attempt": SUPERVISOR, "engine": ENGINE_HOST}


def main(commands: Mapping[str, Sequence[str]] = COMMANDS) -> None:
    parser = argparse.ArgumentParser(prog=Path(__file__).stem, allow_abbrev=False)
    parser.add_argument("--kind", choices=sorted(commands), required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--plane", required=True)
    parser.add_argument("--cpus", type=int)
    given = parser.parse_args()
    Entry(commands[given.kind], given.kind, given.id, given.plane, given.cpus).run(os.environ.pop(TICKET, ""))


if __name__ == "__main__":
    main()
