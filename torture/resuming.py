"""kill -9 of trainer, supervisor and environment host, at named points and at random: the adapter is the same.

Real training of flash/nano. One uninterrupted run gives the SHA-256 that every tortured one must reach; each
tortured run dies many times over, once an attempt.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from flash.failpoints import HOST, ONCE, SUPERVISOR, TRAINER, VARIABLE
from torture.machine import Machine
from torture.tally import Tally

# Everything that a default could change between two runs is said.
SFT = {
    "max_steps": 8, "save_every": 1, "batch_size": 2, "max_length": 64, "lora_rank": 4, "learning_rate": 1e-3,
}  # fmt: skip
GRPO = {
    "steps": 6, "save_every": 1, "batch_size": 2, "group_size": 2, "max_tokens": 8, "max_length": 64, "lora_rank": 4,
    "learning_rate": 1e-3,
}  # fmt: skip
PATIENCE_S = 3600.0  # for a run that dies some thirty times on a machine with other things to do
PARTS = ("flash.worker.supervisor", "flash.worker.trainer", "environment_host")


def sft(count: int, seed: int) -> Tally:
    return resume("sft", SFT, count, seed)


def grpo(count: int, seed: int) -> Tally:
    return resume("grpo", GRPO, count, seed)


def resume(algorithm: str, train: dict[str, Any], count: int, seed: int) -> Tally:
    """Kills until `count` is reached; a run that does not end with the expected adapter loses all of its kills."""
    chance = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder) / "home")
        try:
            machine.start()
            machine.push()
            began = time.monotonic()
            first = machine.submit(train, algorithm=algorithm)
            assert machine.ended(first)["state"] == "done", machine.status(first)["summary"]
            expected, spec = machine.adapter_sha256(first), machine.status(first)["spec"]
            typical_s = time.monotonic() - began
            tally.counts = {"at named points": 0, "at random": 0}
            while tally.injected < count:
                wanted = count - tally.injected
                at_points = chance.random() < 0.6 or tally.injected == 0
                kills, run_id = (_at_points if at_points else _at_random)(
                    machine, train, algorithm, chance, wanted, typical_s
                )
                tally.counts["at named points" if at_points else "at random"] += kills
                status = machine.ended(run_id, PATIENCE_S)
                assert status["spec"] == spec, "the code changed meanwhile: nothing can be compared"
                whole = _whole(machine, run_id)
                same = status["state"] == "done" and machine.adapter_sha256(run_id) == expected
                loss = f"{run_id}: {status['summary']}; same adapter {same}, events {whole}"
                for _ in range(kills):
                    tally.count(same and whole, loss)
                if not kills and not (same and whole):
                    tally.losses.append(loss)
        finally:
            machine.close()
    return tally


def _at_points(
    machine: Machine, train: dict[str, Any], algorithm: str, chance: random.Random, wanted: int, _: float
) -> tuple[int, str]:
    """One run whose attempts die at named points, one each, in a random order."""
    names = [*TRAINER, *SUPERVISOR, *HOST]
    chance.shuffle(names)
    points = [f"{name}:{chance.choice((1, 1, 2))}@{epoch}" for epoch, name in enumerate(names[:wanted], 1)]
    machine.kill()
    once = Path(tempfile.mkdtemp(dir=machine.home))
    machine.start(**{VARIABLE: " ".join(points), ONCE: str(once)})
    run_id = machine.submit(train, algorithm=algorithm)
    machine.ended(run_id, PATIENCE_S)
    machine.kill()
    machine.start()
    return len(list(once.iterdir())), run_id


def _at_random(
    machine: Machine, train: dict[str, Any], algorithm: str, chance: random.Random, wanted: int, typical_s: float
) -> tuple[int, str]:
    """One run that loses a part of its attempt after random times."""
    run_id = machine.submit(train, algorithm=algorithm)
    kills = 0
    while kills < min(wanted, 12):
        time.sleep(chance.uniform(0, typical_s * 0.7))
        if machine.status(run_id)["state"] in ("done", "failed"):
            break
        victims: list[psutil.Process] = machine.processes(run_id, chance.choice(PARTS))
        for victim in victims[:1]:
            with contextlib.suppress(psutil.Error):
                victim.kill()
                kills += 1
    return kills, run_id


def _whole(machine: Machine, run_id: str) -> bool:
    """Whether the history has every number once."""
    return all(event["seq"] == at for at, event in enumerate(machine.events(run_id), 1))
