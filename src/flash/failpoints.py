"""Named places at which a process can be told to die at once, as if by kill -9: for tests of what survives.

Off unless `FLASH_FAILPOINTS` is set, e.g. `FLASH_FAILPOINTS="checkpoint.synced:2, upload.manifest:1@2"`: the
process that comes by a name for the n-th time kills itself. In a worker's processes a point counts for one
attempt alone, the first unless `@epoch` says another, so that the next attempt gets past it; and a process that
is replaced within its attempt gets past it where `FLASH_FAILPOINTS_ONCE` names a folder to remember it in. Where
`FLASH_FAILPOINTS_HOLD` names a file, the process does not die but waits for as long as that file is there, so that
something else can be done to it meanwhile.

Owns the list of names and the counting. Knows nothing of what happens at any of them.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time

VARIABLE = "FLASH_FAILPOINTS"
ONCE = "FLASH_FAILPOINTS_ONCE"
HOLD = "FLASH_FAILPOINTS_HOLD"
VARIABLES = (VARIABLE, ONCE, HOLD)
MARK = "FLASH_ATTEMPT_ID"  # "<run-id>.<epoch>" in every process of an attempt

# By process; a name says what has just happened.
TRAINER = (
    "trainer.job",           # the job has arrived
    "trainer.loaded",        # the base model is loaded
    "trainer.step",          # a step's metrics are reported
    "checkpoint.adapter",    # a checkpoint's adapter is written, its state is not
    "checkpoint.synced",     # all of it is on disk, under its temporary name
    "checkpoint.renamed",    # it has its name and was not reported
    "trainer.saved",         # it was reported
    "trainer.trained",       # the last step is done, the evaluation is not
    "trainer.outcome",       # the outcome is about to be told
)
SUPERVISOR = (
    "supervisor.claimed",
    "supervisor.began",      # trainer started, environment and job under way
    "supervisor.ready",      # the environment host answers
    "store.draft",           # an object is written under its temporary name
    "upload.object",         # an object is in the store
    "upload.objects",        # all are, the manifest is not
    "upload.manifest",       # the manifest is too, and was not reported
    "upload.reported",
    "events.synced",         # a batch is safe on disk and was not sent
    "events.sent",           # it was sent; the answer is not taken note of
    "supervisor.flushed",    # everything is told but the end
    "supervisor.finished",   # the end is told, the process is still there
)
HOST = ("host.call", "host.answer")
SERVER = (
    "server.submitted",      # a submit is committed and not answered
    "server.attempt",        # an attempt is recorded and has no worker
    "server.launched",       # its worker runs and is not recorded
    "server.claimed",        # a claim is committed and not answered
    "server.events",         # a batch is committed and not acknowledged
    "server.checkpoint",     # a checkpoint is recorded and not acknowledged
    "server.finish",         # a worker's last word is recorded and not acknowledged
    "server.salvaged",       # a dead worker's last events are stored, its attempt still open
)
NAMES = frozenset({*TRAINER, *SUPERVISOR, *HOST, *SERVER})

_FORM = re.compile(r"(?P<name>[a-z.]+):(?P<nth>\d+)(?:@(?P<epoch>\d+))?")


def parse(text: str, *, epoch: int | None = None) -> dict[str, int]:
    """Which points are armed in this process, and how many times each still lets pass, plus one."""
    armed = {}
    for part in text.replace(",", " ").split():
        match = _FORM.fullmatch(part)
        if match is None or match["name"] not in NAMES or int(match["nth"]) < 1:
            raise ValueError(f"{VARIABLE} = {text!r}: {part!r} is not name:nth[@epoch] with a known name")
        if epoch is None or epoch == int(match["epoch"] or 1):
            armed[match["name"]] = int(match["nth"])
    return armed


def _own_epoch() -> int | None:
    tail = os.environ.get(MARK, "").rpartition(".")[2]
    return int(tail) if tail.isdigit() else None


_lock = threading.Lock()
_armed: dict[str, int] = {}


def arm() -> None:
    """Reads the variables anew: for a process that was given them after its start."""
    _armed.clear()
    _armed.update(parse(os.environ.get(VARIABLE, ""), epoch=_own_epoch()))


arm()


def _first_time(name: str) -> bool:
    folder = os.environ.get(ONCE)
    if folder is None:
        return True
    try:
        note = f"{os.environ.get(MARK, 'server')}-{name}"
        os.close(os.open(os.path.join(folder, note), os.O_CREAT | os.O_EXCL))  # noqa: PTH118
    except FileExistsError:
        return False
    return True


def failpoint(name: str) -> None:
    """Dies or waits here if this is the time that `FLASH_FAILPOINTS` asks for; else nothing happens."""
    if not _armed or name not in _armed:
        return
    with _lock:
        _armed[name] -= 1
        if _armed[name] != 0:
            return
    if (held := os.environ.get(HOLD)) is not None:
        while os.path.exists(held):  # noqa: PTH110
            time.sleep(0.02)
    elif _first_time(name):
        os.kill(os.getpid(), signal.SIGKILL)
