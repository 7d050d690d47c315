"""The trainer as its supervisor sees it: a child process, a channel, and what it prints.

Owns starting it in a minimal environment (afresh, or as one that stands by), killing it with everything that it
started, and collecting its exit. Knows nothing of what the frames mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.errors import Unavailable
from flash.launching.lineage import die_with
from flash.worker.channel import Channel, ChannelClosed, Frame
from flash.worker.environment_host import PASSED_ON
from flash.worker.reporting import LogIntake

TRAINER = (sys.executable, "-P", "-m", "flash.worker.trainer")

# Beyond what any child gets: the accelerator's own variables, and where models are cached.
_PASSED_ON = (*PASSED_ON, "HOME", "FLASH_HOME", "CUDA_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "HF_HOME", "HF_HUB_", "HF_ENDPOINT", "HF_DATASETS_", "TRANSFORMERS_")


def _start(
    command: Sequence[str], work_dir: Path, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The program in a process of its own, and our end of the channel to it."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    try:
        process = subprocess.Popen(
            [*command, "--fd", str(theirs.fileno())],
            cwd=work_dir,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
    except OSError as error:
        ours.close()
        raise Unavailable(f"the trainer can't be started: {error}") from error
    finally:
        theirs.close()
    return process, ours


def trainer_environment(environ: Mapping[str, str], *, device: str, threads: int) -> dict[str, str]:
    """What a trainer needs, and no secret but the operator's own token for model downloads."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _PASSED_ON or (name.startswith(_PREFIXES) and "TOKEN" not in name)
    }
    if "HF_TOKEN" in environ:
        kept["HF_TOKEN"] = environ["HF_TOKEN"]
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return {
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",              # numpy's: no product of ours is large enough for more
        "OMP_WAIT_POLICY": "PASSIVE",             # threads that spin starve each other on a machine in use
        "TOKENIZERS_PARALLELISM": "false",        # one attempt's threads are counted above
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",     # what PyTorch asks for deterministic cuBLAS
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
    }


def usable_cpus() -> int:
    """CPUs that this process may really use: affinity, and a container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return cpus


class StandBy:
    """A trainer that was forked ahead of time and waits to be told its variables and folder; as a Popen, once begun."""

    def __init__(self, pid: int, channel: socket.socket, words: int, output: int) -> None:
        self.pid = pid
        self.channel = channel
        self.stdout = os.fdopen(output, "rb", buffering=0)
        self._words = words

    def begin(self, environment: Mapping[str, str], work_dir: Path) -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._words, "wb") as words:
            words.write(json.dumps({"environ": dict(environment), "cwd": str(work_dir)}).encode() + b"\n")

    def wait(self) -> int:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # somebody else has waited for it; subprocess says 0 then, too
            return 0


class TrainerProcess:
    """One trainer, from start to the end of its output. Start it on a thread that lives as long as it should.

    `on_frame` gets its frames other than calls, `on_call` its calls, `on_exit(status)` comes once, after every
    frame and every line of output was handed over; negative for a signal, as in `subprocess`.
    """

    def __init__(
        self,
        trainer: Sequence[str] | StandBy,
        *,
        work_dir: Path,
        environment: Mapping[str, str],
        output: LogIntake,
        on_frame: Callable[[Frame], None],
        on_call: Callable[[str, dict[str, Any], float | None], Any],
        on_exit: Callable[[int], None],
    ) -> None:
        self._output = output
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | StandBy
        if isinstance(trainer, StandBy):
            trainer.begin(environment, work_dir)
            self._process, ours = trainer, trainer.channel
        else:
            self._process, ours = _start(trainer, work_dir, environment)
        self.pid = self._process.pid
        self._channel = Channel(ours, on_call=on_call, on_frame=on_frame, send_timeout_s=60).start()
        self._reader = threading.Thread(target=self._read, name="trainer output", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name="trainer wait", daemon=True).start()

    def send(self, frame: Mapping[str, Any]) -> None:
        """Sends a frame; to a trainer that is gone it is no error, since its exit tells more."""
        with contextlib.suppress(ChannelClosed):
            self._channel.send(frame)

    def kill(self) -> None:
        """Kills it and whatever it started in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _wait(self) -> None:
        status = self._process.wait()
        self.kill()                    # children that outlived it hold the channel and the pipe open
        self._channel.wait_closed(5)   # every frame it sent has been handed over
        self._channel.close()
        self._reader.join(5)
        self._on_exit(status)

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            descriptor = stream.fileno()
            while True:
                readable, _, _ = select.select([descriptor], [], [], 0.25)
                if readable:
                    chunk = os.read(descriptor, 65_536)
                    if not chunk:
                        break
                    self._output.feed(chunk)
                self._output.tick()
                if self._output.dropped:
                    threading.Event().wait(0.01)  # a flood slows itself down, not the rest of this process
        self._output.close()
