"""How long a run is without a worker: from the loss to the next attempt at work, within the lease and ten seconds.

Real processes with a scripted trainer. A worker dies alone, with all that it started, or just stops answering; only
the last has to wait for its lease.
"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import time
from pathlib import Path

import psutil

from torture.machine import SCRIPTED_SERVER, Machine, wait_for
from torture.tally import Tally

LEASE_S = 3.0
ALLOWED_S = LEASE_S + 10.0
LOSSES = ("supervisor killed", "all of it killed", "stopped")


def recoveries(count: int, seed: int) -> Tally:
    chance = random.Random(seed)
    tally = Tally()
    slowest = dict.fromkeys(LOSSES, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder) / "home", command=SCRIPTED_SERVER, FLASH_SERVER_LEASE_S=str(LEASE_S))
        try:
            machine.start()
            machine.push()
            run_id = machine.submit({"max_steps": 10**7, "save_every": 20, "batch_size": 1})
            for epoch in range(1, count + 1):
                wait_for(lambda epoch=epoch: _at_work(machine, run_id, epoch))  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.5))
                loss = chance.choice(LOSSES)
                began = time.monotonic()
                _lose(machine.processes(run_id), loss)
                with contextlib.suppress(TimeoutError):
                    wait_for(lambda epoch=epoch: _at_work(machine, run_id, epoch + 1), 5 * ALLOWED_S)  # type: ignore[misc]
                took = time.monotonic() - began
                slowest[loss] = max(slowest[loss], took)
                tally.count(took <= ALLOWED_S, f"attempt {epoch}, {loss}: nobody at work for {took:.1f} s")
        finally:
            machine.close()
    times = ", ".join(f"{loss} {took:.1f} s" for loss, took in slowest.items() if took)
    tally.note = f"lease {LEASE_S:g} s; at most: {times}"
    return tally


def _at_work(machine: Machine, run_id: str, epoch: int) -> bool:
    status = machine.status(run_id)
    attempts = status["attempts"]
    return len(attempts) == epoch and attempts[-1]["state"] == "running" and attempts[-1]["phase"] == "training"


def _lose(processes: list[psutil.Process], loss: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # the first of them may have ended the others
            if loss == "supervisor killed" and not any("supervisor" in part for part in process.cmdline()):
                continue
            process.send_signal(signal.SIGSTOP if loss == "stopped" else signal.SIGKILL)
