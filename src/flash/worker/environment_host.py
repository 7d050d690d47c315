"""The environment host: user code in a process of its own, and the two sides that talk to it.

`python -m flash.worker.environment_host --fd N` is the host; `EnvironmentHost` starts it, keeps its time limits
by killing and restarting it, and reads what it prints; `RemoteEnvironment` is the `EnvironmentClient` that asks
through a channel. The host gets a bare environment: nothing of the control plane's, of other runs or of the
trainer's. Knows nothing of runs, models or stores.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from flash.environments.loading import LocalEnvironment, make_random_per_thread
from flash.environments.protocol import (
    EnvironmentInfo,
    EpisodeStart,
    FinishedEpisode,
    Message,
    Rows,
    Score,
    SFTTarget,
    StepResult,
)
from flash.errors import FlashError, InternalError, UserCodeError
from flash.failpoints import failpoint
from flash.launching.accounts import Account
from flash.worker.channel import Channel, ChannelClosed, Frame

# --- the client in the trainer ----------------------------------------------------------------------


@dataclass(frozen=True)
class CallLimits:
    """Seconds that one call may take once the environment has begun it."""

    load_s: float = 600.0
    rows_s: float = 600.0
    hook_s: float = 120.0  # starts, targets and steps
    score_s: float = 300.0  # one group


class RemoteEnvironment:
    """An `EnvironmentClient` over a channel whose other side passes calls to a host."""

    def __init__(self, channel: Channel, limits: CallLimits | None = None) -> None:
        self._channel = channel
        self._limits = limits or CallLimits()

    def info(self) -> EnvironmentInfo:
        answer = self._channel.call("info", {}, timeout_s=self._limits.hook_s)
        return EnvironmentInfo(answer["multi_turn"], tuple(answer["splits"]), tuple(answer["warnings"]))

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        params = {"split": split, "limit": limit}
        answer = self._channel.call("rows", params, timeout_s=self._limits.rows_s)
        return Rows(answer["split"], answer["path"], answer["count"], tuple(answer["warnings"]))

    def targets(self, split: str, indices: Sequence[int]) -> list[SFTTarget]:
        params = {"split": split, "indices": list(indices)}
        answer = self._channel.call("targets", params, timeout_s=self._limits.hook_s)
        return [SFTTarget(**target) for target in answer]

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
        params = {"split": split, "indices": list(indices), "seed": seed}
        answer = self._channel.call("start", params, timeout_s=self._limits.hook_s)
        return [EpisodeStart(**start) for start in answer]

    def step(self, split: str, index: int, messages: list[Message], response: str, *, seed: int) -> StepResult:
        params = {"split": split, "index": index, "messages": messages, "response": response, "seed": seed}
        return StepResult(**self._channel.call("step", params, timeout_s=self._limits.hook_s))

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        group = [vars(episode) for episode in episodes]
        params = {"split": split, "index": index, "episodes": group, "seed": seed}
        answer = self._channel.call("score", params, timeout_s=self._limits.score_s)
        return [Score(**score) for score in answer]

    def close(self) -> None:
        """The host belongs to the supervisor, which ends it."""


# --- the supervisor's side --------------------------------------------------------------------------

# What a process needs to run at all and to reach the network; everything else of the parent's stays behind.
PASSED_ON = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
)  # fmt: skip
MODULE = "flash.worker.environment_host"
TAG = "ENVIRONMENT_HOST_TAG"  # marks a host's descendants, so that those which left its group are found too
OutputHandler = Callable[[str, str], None]
_PR_SET_NO_NEW_PRIVS = 38


def base_environment(home: Path) -> dict[str, str]:
    """The environment variables that a process with user code starts from; its home is a folder of its own."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**kept, "HOME": str(home), "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class HostBounds:
    """What a host and its descendants may take together before they are stopped; the trainer needs the rest."""

    memory_bytes: int = field(default_factory=lambda: psutil.virtual_memory().total // 2)
    processes: int = 512
    interval_s: float = 0.25


@dataclass(frozen=True)
class HostSpec:
    """What a host runs. `variables` are the declared secrets and `[worker_env]`."""

    folder: Path
    work_dir: Path
    params: Mapping[str, Any]
    variables: Mapping[str, str]
    contract: str | None = None
    python: str = sys.executable
    bounds: HostBounds = field(default_factory=HostBounds)
    account: Account | None = None  # as whom it runs; then `work_dir` is theirs, with `home` and `tmp` in it


class EnvironmentHost:
    """A host process that is always there: killed when a call exceeds its limit or it dies, started for the next.

    `call` is safe from many threads; calls overlap as far as the environment allows. A call that was under way
    when another one's limit ended the host is sent again, once; one that was under way when the host died by
    itself fails, since it may be what killed it; after a SIGKILL, which may have come from anywhere, it is sent
    again once. `on_output(stream, line)` gets what user code prints, from threads of its own.
    """

    def __init__(
        self,
        spec: HostSpec,
        *,
        on_output: OutputHandler = lambda stream, line: None,
        limits: CallLimits | None = None,
    ) -> None:
        self._spec = spec
        self._on_output = on_output
        self._limits = limits or CallLimits()
        self._starting = threading.Lock()  # one start at a time; whoever needs the host waits for it
        self._process: _HostProcess | None = None
        self._loaded = False
        self._rows_asked: dict[str, dict[str, Any]] = {}
        self._closed = False
        self.restarts = 0

    def start(self) -> None:
        """Starts the process and imports the environment; raises what `call` raises."""
        try:
            self._live()
        except _Killed:
            self._start_again()

    def call(self, method: str, params: Mapping[str, Any], timeout_s: float | None = None) -> Any:
        """One of `EnvironmentClient`'s methods, as JSON. Raises UserCodeError on a time-out or a death."""
        limit = self._limits.hook_s if timeout_s is None else timeout_s
        killed: _Killed | None = None
        for _ in range(3):
            try:
                result = self._live().call(method, params, limit)
            except _CutShort:
                continue
            except _Killed as death:
                if killed is not None:
                    raise death.error from None
                killed = death
                continue
            if method == "rows":
                self._rows_asked[str(params.get("split"))] = dict(params)
            return result
        if killed is not None:
            raise killed.error
        raise UserCodeError(f"{method} was cut short thrice, as other calls of this environment exceeded their limits")

    def _start_again(self) -> None:
        try:
            self._live()
        except _Killed as death:
            raise death.error from None

    def close(self) -> None:
        """Ends the process and everything that it started, also while it loads; later calls fail. Idempotent."""
        self._closed = True
        if self._process is not None:
            self._process.kill("closed")

    @property
    def pid(self) -> int | None:
        """The live host's process id."""
        process = self._process
        return process.pid if process is not None and process.alive else None

    def _live(self) -> _HostProcess:
        with self._starting:
            process = self._process
            if process is not None and self._loaded and process.alive:
                return process
            self._refuse_if_closed()
            if process is not None:
                process.kill("replaced")
                self.restarts += 1
            self._loaded = False
            process = self._process = _HostProcess(self._spec, self._on_output)
            self._load(process)
            self._loaded = True
            self._refuse_if_closed()  # close() may have come while there was no process to kill
            return process

    def _refuse_if_closed(self) -> None:
        if self._closed:
            if self._process is not None:
                self._process.kill("closed")
            raise _closed()

    def _load(self, process: _HostProcess) -> None:
        """Imports the environment and reads again the splits that were asked for before a restart."""
        spec = self._spec
        params = {
            "folder": str(spec.folder),
            "params": dict(spec.params),
            "work_dir": str(spec.work_dir),
            "contract": spec.contract,
        }
        try:
            process.call("load", params, self._limits.load_s)
            for asked in list(self._rows_asked.values()):
                process.call("rows", asked, self._limits.rows_s)
        except _CutShort:
            raise _closed() from None
        except BaseException:
            process.kill("failed to load")
            raise


def _closed() -> UserCodeError:
    return UserCodeError("the environment host is closed")


class _CutShort(Exception):
    """The host was killed because of another call than this one."""


class _Killed(Exception):
    """Something sent the host SIGKILL, and it was not us: the system, a person. Worth one more try."""

    def __init__(self, error: FlashError) -> None:
        super().__init__(str(error))
        self.error = error


class _HostProcess:
    """One host process, from start to death. Not restarted: `EnvironmentHost` makes another."""

    def __init__(self, spec: HostSpec, on_output: OutputHandler) -> None:
        self._tag = uuid.uuid4().hex
        self._begun: dict[int, float] = {}
        self._activity = time.monotonic()
        self._state = threading.Condition()
        self._killed_because: str | None = None
        self._bounds = spec.bounds
        self._excess: str | None = None  # which bound it broke
        self._status: int | None = None
        home = spec.work_dir / "home"
        confined: list[str] = []
        variables = {**base_environment(home), "CUDA_VISIBLE_DEVICES": "", **spec.variables, TAG: self._tag}
        if spec.account is None:
            home.mkdir(parents=True, exist_ok=True)
        else:
            confined = ["--confined"]
            variables["TMPDIR"] = str(spec.work_dir / "tmp")
        ours, theirs = socket.socketpair()
        command = [spec.python, "-P", "-s", "-X", "faulthandler", "-m", MODULE, "--fd", str(theirs.fileno()), *confined]
        try:
            self._process = subprocess.Popen(
                command,
                cwd=spec.folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                **(spec.account.popen if spec.account else {}),
            )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            raise InternalError(f"the environment host can't be started: {error}") from None
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._channel = Channel(ours, on_frame=self._on_frame, send_timeout_s=60).start()
        self._readers = [
            _read_output(stream, name, on_output)
            for name, stream in (("stdout", self._process.stdout), ("stderr", self._process.stderr))
            if stream is not None
        ]
        threading.Thread(target=self._wait, name="environment-host-wait", daemon=True).start()
        threading.Thread(target=self._watch, name="environment-host-watch", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._status is None and self._killed_because is None and not self._channel.closed

    def call(self, method: str, params: Mapping[str, Any], limit: float) -> Any:
        sent = time.monotonic()
        begun = False
        try:
            call = self._channel.begin(method, params, timeout_s=limit)
            begun = self._await(call.id, call.result, sent, limit, method)
            return call.result.result()
        except ChannelClosed:
            raise self._death(method, begun) from None

    def kill(self, reason: str | None = None) -> None:
        """Kills the process, its group, and whatever else carries its tag; `reason` tells that we meant it."""
        with self._state:
            if self._killed_because is None and self._status is None:
                self._killed_because = reason
        if self._status is None:  # afterwards the number may be another process's
            _kill_tree(self.pid)
        for pause_s in (0.0, 0.02):  # twice: a process that has just begun to run shows no environment yet
            time.sleep(pause_s)
            _kill_tagged(self._tag)
        self._channel.close()

    # --- time limits ---

    def _on_frame(self, frame: Frame) -> None:
        if frame.get("type") == "begin":
            with self._state:
                self._begun[frame["id"]] = self._activity = time.monotonic()

    def _await(self, call_id: int, result: Future[Any], sent: float, limit: float, method: str) -> bool:
        """Waits for the result; kills the host when this call has run for `limit` seconds. True if it was begun.

        A call counts from when the host begins it: calls that queue behind others of a serial environment don't
        pay for them. One that isn't begun although nothing else runs counts from the host's last sign of life.
        """
        try:
            while True:
                now = time.monotonic()
                with self._state:
                    begun = self._begun.get(call_id)
                    others = len(self._begun) - (begun is not None)
                    waiting_since = begun if begun is not None else max(sent, self._activity)
                left = waiting_since + limit - now
                if left <= 0 and (begun is not None or not others):
                    raise self._time_out(method, limit)
                try:
                    result.exception(timeout=max(0.01, min(left, 0.5) if begun is None else left))
                    return call_id in self._begun
                except FutureTimeout:
                    continue
        finally:
            with self._state:
                self._begun.pop(call_id, None)
                self._activity = time.monotonic()

    def _time_out(self, method: str, limit: float) -> Exception:
        with self._state:
            first = self._killed_because is None
            self._killed_because = self._killed_because or f"{method} exceeded its limit of {limit:g} s"
        if not first:
            return _CutShort(method)
        self.kill()
        return UserCodeError(
            f"the environment's {method} took longer than {limit:g} s; its process was stopped",
            remedy="make it faster, or give it a time-out of its own",
        )

    # --- bounds ---

    def _watch(self) -> None:
        """Stops a host that takes more than its bounds; what shares memory with its parent counts once."""
        while self.alive:
            time.sleep(self._bounds.interval_s)
            memory, count = _taken(self.pid)
            if memory > self._bounds.memory_bytes:
                limit, used = self._bounds.memory_bytes >> 20, memory >> 20
                self._excess = f"it used {used:,} MiB of memory, more than its {limit:,} MiB"
            elif count > self._bounds.processes:
                self._excess = f"it ran {count:,} processes, more than its {self._bounds.processes:,}"
            if self._excess is not None:
                _kill_tree(self.pid)
                return

    # --- death ---

    def _wait(self) -> None:
        self._status = self._process.wait()
        _kill_group(self.pid)  # children that outlived it
        self._channel.close()

    def _death(self, method: str, begun: bool) -> Exception:
        """What a call that the process didn't survive raises."""
        if self._killed_because is not None or not (begun or method == "load"):
            return _CutShort(method)
        deadline = time.monotonic() + 1.0
        while self._status is None and time.monotonic() < deadline:
            time.sleep(0.005)
        status = self._status
        self.kill()
        for reader in self._readers:
            reader.join(0.5)  # the last words: faulthandler's dump, the killer's message
        if self._excess is not None:
            return UserCodeError(f"the environment's process was stopped in {method}: {self._excess}")
        error: FlashError = UserCodeError(f"the environment's process died in {method}: {_cause(status)}")
        if not begun:
            error = InternalError(f"the environment host didn't start: {_cause(status)}")
        return _Killed(error) if status == -signal.SIGKILL else error


def _cause(status: int | None) -> str:
    if status is None or status == CONNECTION_LOST:
        return "its code closed the connection that it answers on"
    if status >= 0:
        return f"it exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"killed by {name}" + (", most likely for want of memory" if name == "SIGKILL" else "")


def _taken(pid: int) -> tuple[int, int]:
    """Bytes of memory of its own, and processes, of a process with its descendants."""
    memory = count = 0
    with contextlib.suppress(psutil.Error):
        host = psutil.Process(pid)
        for process in [host, *host.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                used = process.memory_info()
                # A fork's pages count where they differ, which Linux alone tells cheaply.
                memory += max(0, used.rss - getattr(used, "shared", 0))
                count += 1
    return memory, count


def _prefer_for_memory() -> None:
    """When memory runs out, the kernel should stop this process and not the trainer (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")


def _renounce_privileges() -> None:
    """No set-user-id program, such as sudo, gives this process or its children any right (Linux)."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the environment host can't be confined")


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # already gone
        os.killpg(pid, signal.SIGKILL)


def _kill_tree(pid: int) -> None:
    """Kills a host, its group and its descendants."""
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(pid).children(recursive=True)
    _kill_group(pid)
    for process in descendants:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _kill_tagged(tag: str) -> None:
    """Kills what left the group and lost its parent, but still carries the tag."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(TAG) == tag:
                process.kill()
        except (psutil.Error, OSError):
            continue


# --- what user code prints --------------------------------------------------------------------------

MAX_LINE_BYTES = 16_384
BURST_BYTES = 512 << 10  # printed at once without loss …
REFILL_BYTES_S = 64 << 10  # … and steadily after that


class _Output:
    """Passes lines on up to a rate, and says how much it left out; user code may print without end."""

    def __init__(self, name: str, on_output: OutputHandler) -> None:
        self._name = name
        self._on_output = on_output
        self._allowance = float(BURST_BYTES)
        self._then = time.monotonic()
        self._left_out = 0

    def add(self, line: bytes) -> None:
        now = time.monotonic()
        self._allowance = min(BURST_BYTES, self._allowance + (now - self._then) * REFILL_BYTES_S)
        self._then = now
        if len(line) > self._allowance:
            self._left_out += len(line)
            return
        self._allowance -= len(line)
        self.tell_left_out()
        self._on_output(self._name, line.decode("utf-8", "replace").rstrip("\r\n"))

    def tell_left_out(self) -> None:
        if self._left_out:
            self._on_output(self._name, f"… {self._left_out:,} bytes of output left out …")
            self._left_out = 0


def _read_output(stream: IO[bytes], name: str, on_output: OutputHandler) -> threading.Thread:
    def read() -> None:
        output = _Output(name, on_output)
        with stream:
            while line := stream.readline(MAX_LINE_BYTES):
                # A listener that fails must not stop the reading: user code would block on a full pipe.
                with contextlib.suppress(Exception):
                    output.add(line)
        with contextlib.suppress(Exception):
            output.tell_left_out()

    thread = threading.Thread(target=read, name=f"environment-host-{name}", daemon=True)
    thread.start()
    return thread


# --- the host process -------------------------------------------------------------------------------


CONNECTION_LOST = 70  # exit status
ORPHAN_GRACE_S = 30.0


class _Server:
    """Answers calls: `load` first, on the main thread; then on a pool, or all on the main thread if serial."""

    def __init__(self, sock: socket.socket, grace_s: float) -> None:
        self._grace_s = grace_s
        self._fd = sock.fileno()
        self._inode = os.fstat(self._fd).st_ino
        self._pid = os.getpid()
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._environment: LocalEnvironment | None = None
        self._limits: dict[int, float] = {}  # of the calls that run, by id: when each should be over
        self._limits_lock = threading.Lock()
        self._alarm: float | None = None  # when it goes off; see _set_alarm
        self._channel = Channel(sock, on_frame=self._frames.put, on_close=_end)
        # A child that user code forks must not keep the connection open, let alone speak on it.
        os.register_at_fork(after_in_child=lambda: _close_quietly(self._fd))

    def serve(self) -> None:
        self._channel.start()
        pool: ThreadPoolExecutor | None = None
        while True:
            try:
                frame = self._frames.get(timeout=self._grace_s / 6)
            except queue.Empty:
                self._set_alarm()
                continue
            if pool is None:
                self._run(frame)
                if self._environment is not None and not self._environment.serial:
                    pool = ThreadPoolExecutor(32, thread_name_prefix="environment-call")
            else:
                pool.submit(self._run, frame)

    def _run(self, frame: Frame) -> None:
        self._say({"type": "begin", "id": frame["id"]})
        failpoint("host.call")
        if (limit := frame.get("timeout_s")) is not None:
            with self._limits_lock:
                self._limits[frame["id"]] = time.monotonic() + limit
        self._set_alarm()
        try:
            answer = {"result": self._answer(frame["method"], frame["params"])}
        except FlashError as error:
            answer = {"error": error.to_wire()}
        except BaseException as error:
            answer = {"error": InternalError(f"{frame['method']}: {type(error).__name__}: {error}").to_wire()}
        failpoint("host.answer")
        with self._limits_lock:
            self._limits.pop(frame["id"], None)  # the alarm stays for the next call, or until none has come for a while
        self._say({"type": "reply", "id": frame["id"], **answer})

    def _set_alarm(self) -> None:
        """Ends this process some time after the last running call should be over.

        The supervisor kills it at the limit. But code stuck inside C, holding the interpreter's lock, would
        outlive a supervisor that died meanwhile: no thread could notice. This alarm needs no interpreter. To set it
        takes a thread, so it is moved only where it would go off too early or far too late.
        """
        with self._limits_lock:
            over = max(self._limits.values(), default=None)
            if over is None:
                faulthandler.cancel_dump_traceback_later()
                self._alarm = None
            elif self._alarm is None or not self._grace_s <= self._alarm - over <= 3 * self._grace_s:
                self._alarm = over + 2 * self._grace_s
                seconds = max(self._grace_s, self._alarm - time.monotonic())
                faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)

    def _say(self, frame: Frame) -> None:
        """Sends, unless user code has closed or taken over our descriptor, or this is a fork of it."""
        try:
            intact = os.getpid() == self._pid and os.fstat(self._fd).st_ino == self._inode
        except OSError:
            intact = False
        if not intact:
            os._exit(CONNECTION_LOST)
        self._channel.send(frame)

    def _answer(self, method: str, params: dict[str, Any]) -> Any:
        if method == "load":
            self._environment = LocalEnvironment(
                params["folder"], params["params"], params["work_dir"], contract=params["contract"]
            )
            return None
        if self._environment is None:
            raise InternalError(f"{method} before load")
        if method == "score":
            params = {**params, "episodes": [FinishedEpisode(**episode) for episode in params["episodes"]]}
        if method not in ("info", "rows", "targets", "start", "step", "score"):
            raise InternalError(f"no such method: {method}")
        result = getattr(self._environment, method)(**params)
        return [vars(item) for item in result] if isinstance(result, list) else vars(result)  # of plain JSON


def _end() -> None:
    """The supervisor is gone: so is this process, with its children."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--confined", action="store_true", help="no program that it starts gains rights (Linux)")
    parser.add_argument("--grace", type=float, default=ORPHAN_GRACE_S, help="seconds past a call's limit to the end")
    arguments = parser.parse_args()
    fd = arguments.fd
    os.set_inheritable(fd, False)
    if arguments.confined:
        _renounce_privileges()
    make_random_per_thread()
    _prefer_for_memory()
    _Server(socket.socket(fileno=fd), arguments.grace).serve()


if __name__ == "__main__":
    main()
