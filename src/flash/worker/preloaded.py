"""The preloaded process: imports what supervisors and trainers import, once, and forks workers that have it.

`python -m flash.worker.preloaded --fd N` says `loaded` on that socket, and then answers each `fork`, which brings the
worker's standard input and log along, with the pid of a new one. It ends when the socket does. A fork is a supervisor
with a trainer of its own beside it; each reads from its standard input what it is to be: one line of JSON, `{environ,
cwd}`. What follows is as if it had been started afresh.

A fork copies one thread and everything else, so this process has one thread, no secret, and has touched no GPU; if
that does not hold after the imports, it ends, and workers are started afresh. Linux only.

A process shows other processes the variables it was started with, whatever it sets later; a launcher looks there for
an attempt's mark. So this one is started with room for a mark, and a fork writes its own there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from flash import failpoints
from flash.failpoints import MARK
from flash.launching.lineage import die_with
from flash.worker.trainer_process import StandBy, trainer_environment, usable_cpus

_ROOM = 256  # bytes for an attempt's id
_NO_MARK = "-"


def load() -> None:
    """All that a trainer imports until its first step. No tensor is computed: that would start threads.

    Imports make many objects and no garbage: looking for it in between would take a fourth of the time.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import flash.training.evaluation
    import flash.training.grpo
    import flash.training.sft
    import flash.worker.supervisor
    import flash.worker.trainer  # noqa: F401
    from flash.catalog.catalog import PACKAGE_FOLDER
    from flash.inference.chat import ChatRenderer
    from flash.inference.loading import describe

    nano = describe(PACKAGE_FOLDER / "nano")
    ChatRenderer(nano.tokenizer).render_prompt([{"role": "user", "content": "?"}])
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(nano.config, attn_implementation="sdpa")


def supervise(trainer: StandBy) -> NoReturn:
    from flash.worker.supervisor import main

    main(trainer)


def serve(channel: socket.socket) -> NoReturn:
    from flash.worker.trainer import serve

    serve(channel)


@dataclass(frozen=True)
class Work:
    """What this process loads, and what its forks do; tests have their own."""

    load: Callable[[], None] = load
    supervise: Callable[[StandBy], NoReturn] = supervise
    serve: Callable[[socket.socket], NoReturn] = serve


def main(work: Work | None = None) -> None:
    work = work or Work()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, default=os.getppid())
    arguments = parser.parse_args()
    if len(os.environ.get(MARK, "")) != _ROOM:
        _start_bare(arguments.fd, arguments.parent)
    die_with(arguments.parent)
    gc.disable()
    os.set_inheritable(arguments.fd, False)
    work.load()
    _show_mark(_NO_MARK)
    _refuse_if_unfit()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page that holds an object
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks are reaped by the kernel
    _answer(socket.socket(fileno=arguments.fd), work)


def _start_bare(fd: int, parent: int) -> NoReturn:
    """Again, with a trainer's variables alone: the server's may be secret, and libraries read theirs when loaded."""
    threads = usable_cpus()
    kept = trainer_environment(dict(os.environ), device="", threads=threads)
    kept.pop("HF_TOKEN", None)  # the only secret that trainers have; forks are told it
    os.set_inheritable(fd, True)
    kept["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # who asks whether there are GPUs asks no driver
    variables = {**kept, MARK: _NO_MARK * _ROOM}  # last, so that nothing follows its room
    os.execve(sys.executable, [*sys.orig_argv, "--parent", str(parent)], variables)


def _refuse_if_unfit() -> None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1 or not _gpu_fit():
        print(f"a fork would not be whole: {threads} threads, a GPU that {'works' if _gpu_fit() else 'fails'} in it")
        sys.stdout.flush()
        os._exit(1)  # no thread holds up the end


def _gpu_fit() -> bool:
    """Whether a fork may use a GPU: a driver that was asked anything before the fork works in the parent alone."""
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _answer(requests: socket.socket, work: Work) -> None:
    requests.send(b"loaded")
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 64, 2)
        if message != b"fork":
            return
        stdin, log = descriptors
        pid = os.fork()
        if pid == 0:
            requests.close()
            _supervisor(stdin, log, work)
        os.close(stdin)
        os.close(log)
        requests.send(json.dumps(pid).encode())


def _supervisor(stdin: int, log: int, work: Work) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _use(stdin, log)
    trainer = _fork_trainer(work)
    _become()
    work.supervise(trainer)


def _fork_trainer(work: Work) -> StandBy:
    """While this process has one thread still: one that is a supervisor at work can't fork any more."""
    ours, theirs = socket.socketpair()
    read_words, write_words = os.pipe()
    read_output, write_output = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        die_with(parent)
        for end in (ours.detach(), write_words, read_output):
            os.close(end)
        _use(read_words, write_output)
        _become()
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        work.serve(theirs)
    theirs.close()
    for end in (read_words, write_output):
        os.close(end)
    return StandBy(pid, ours, write_words, read_output)


def _use(stdin: int, output: int) -> None:
    os.dup2(stdin, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(stdin)
    os.close(output)


def _become() -> None:
    """Waits to be told what it is; nothing told means that it is not needed."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        os._exit(0)
    told = json.loads(line)
    environ: Mapping[str, str] = told["environ"]
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(told["cwd"])
    _show_mark(environ[MARK])
    failpoints.arm()


def _show_mark(mark: str) -> None:
    """Writes the mark to where the kernel shows this process's variables from."""
    entry = f"{MARK}={mark}".encode()
    room = len(MARK) + 1 + _ROOM
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[47])  # field 50 of the file: where they begin in memory
    shown = Path("/proc/self/environ").read_bytes()
    if len(entry) > room:
        raise ValueError(f"no room for a mark of {len(entry)} bytes")
    ctypes.memmove(start + shown.rindex(f"{MARK}=".encode()), entry.ljust(room, b"\0"), room)
    if entry + b"\0" not in Path("/proc/self/environ").read_bytes():
        raise OSError("this system does not show what a process writes to its variables")


if __name__ == "__main__":
    main()
