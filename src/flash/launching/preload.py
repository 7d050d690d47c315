"""A process that has already loaded what a worker imports: a worker forked from it starts at once.

Owns that process as its user sees it: started once, waited for while it loads, asked for forks, replaced when it
dies. Whoever asks must be ready for None, and then start the worker afresh: so it goes where there is no fork worth
having (not Linux), where torch is missing, and whenever something is wrong here. What is loaded, and what a fork
does, is the program's (`worker/preloaded.py`).
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAM = (sys.executable, "-P", "-m", "flash.worker.preloaded")


class Preloaded:
    """At most one such process. Methods are safe from several threads; `fork` waits for the loading, but never twice
    for what may never end."""

    def __init__(
        self, log: Path, *, program: Sequence[str] = PROGRAM, load_s: float = 30.0, answer_s: float = 5.0
    ) -> None:
        self._log = log
        self._program = tuple(program)
        self._load_s = load_s      # how long a process may load; one that takes longer is replaced
        self._answer_s = answer_s  # how long a loaded one has for a fork
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._loaded = False  # this process has said so
        self._started_at = 0.0
        self._patient = True  # a fork waits for the loading; not after one that never came to its end
        self._hopeful = sys.platform == "linux"  # until one dies before it has loaded: the next would too

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Begins to load, in the background."""
        with self._lock:
            self._start()

    def fork(self, stdin: int, log: int) -> int | None:
        """The pid of a worker that reads what it is from `stdin` and prints to `log`.

        None: there is none to be had, but there may be one that was not heard of in time. So `stdin` has to end then,
        and be nobody else's.
        """
        with self._lock:
            if self._process is None:
                return None
            pid = self._ask(stdin, log) if self._ready() else None
            dead, overdue = self._process.poll() is not None, self._loading_left() <= 0
            if pid is None and (self._loaded or dead or overdue):
                self._hopeful &= self._loaded or not dead
                self._patient = self._loaded
                self._end()
                self._start()
            return pid

    def close(self) -> None:
        with self._lock:
            self._hopeful = False
            self._end()

    def _start(self) -> None:
        if self._process is not None or not self._hopeful:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._program, "--fd", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            self._socket, self._started_at = ours, time.monotonic()
        except OSError:
            ours.close()
            self._hopeful = False
        finally:
            theirs.close()

    def _ready(self) -> bool:
        """Whether it has loaded, waiting for it; a process that ends meanwhile closes its end of the socket."""
        if not self._loaded and self._wait(self._loading_left() if self._patient else 0.0):
            assert self._socket is not None
            self._loaded = self._socket.recv(64) == b"loaded"
        return self._loaded

    def _loading_left(self) -> float:
        """Seconds that this process has still to load."""
        return max(0.0, self._started_at + self._load_s - time.monotonic())

    def _ask(self, stdin: int, log: int) -> int | None:
        assert self._socket is not None
        with contextlib.suppress(OSError, ValueError):
            socket.send_fds(self._socket, [b"fork"], [stdin, log])
            if self._wait(self._answer_s):
                return int(json.loads(self._socket.recv(64)))
        return None

    def _wait(self, seconds: float) -> bool:
        assert self._socket is not None
        ready = select.poll()  # takes descriptors of any number, as `select` does not
        ready.register(self._socket, select.POLLIN)
        return bool(ready.poll(seconds * 1000))

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None
        self._loaded = False
