"""kill -9 of the control plane under load: what it acknowledged is there, and every event once and in order."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx

from flash.failpoints import SERVER, VARIABLE
from torture.machine import SCRIPTED_SERVER, Machine, wait_for
from torture.tally import Tally

LINES = 80  # a step logs


def kills(count: int, seed: int) -> Tally:
    """Restarts the server `count` times over runs whose workers log without pause."""
    chance = random.Random(seed)
    tally = Tally()
    acknowledged: dict[str, str] = {}  # run by key
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder) / "home", command=SCRIPTED_SERVER)
        try:
            machine.start()
            machine.push()
            while tally.injected < count:
                # At a named point now and then, else at any time.
                point = {VARIABLE: f"{chance.choice(SERVER)}:{chance.randint(1, 4)}"} if chance.random() < 0.5 else {}
                machine.kill()
                machine.start(**point)
                with contextlib.suppress(httpx.HTTPError):
                    _load(machine, chance, acknowledged)
                until = time.monotonic() + chance.uniform(0.0, 1.5)
                while time.monotonic() < until and not machine.dead:
                    time.sleep(0.02)
                machine.kill()
                tally.count(True)
            machine.start()
            losses, events = _judge(machine, acknowledged)
        finally:
            machine.close()
    tally.survived -= min(len(losses), tally.injected)
    tally.losses = losses
    tally.counts = {"submits": len(acknowledged), "events": events}
    return tally


def _load(machine: Machine, chance: random.Random, acknowledged: dict[str, str]) -> None:
    """A submit, and the repeat of an earlier one."""
    train = {"max_steps": chance.randint(50, 110), "save_every": 10, "batch_size": LINES}
    key = f"key-{len(acknowledged)}-{chance.getrandbits(32)}"
    if sum(run["state"] in ("queued", "provisioning", "running") for run in _runs(machine)) < 3:
        acknowledged[key] = machine.submit(train, key=key)


def _runs(machine: Machine) -> list[dict[str, object]]:
    found: list[dict[str, object]] = machine.call("GET", "/api/runs", params={"limit": 1000})["runs"]
    return found


def _judge(machine: Machine, acknowledged: dict[str, str]) -> tuple[list[str], int]:
    losses, total = [], 0
    for run_id in acknowledged.values():
        if machine.status(run_id)["state"] not in ("done", "failed"):
            machine.ended(run_id, 3600)
        status = machine.status(run_id)
        if status["state"] != "done":
            losses.append(f"{run_id} ended {status['state']}: {status['summary']}")
        lines = defaultdict(list)
        for at, event in enumerate(machine.events(run_id), 1):
            total += 1
            if event["seq"] != at:
                losses.append(f"{run_id}: event {event['seq']} stands at {at}")
                break
            if event["kind"] == "log" and event["data"]["stream"] == "trainer":
                lines[event["epoch"]].append(event["data"]["text"])
        losses += [f"{run_id}: attempt {epoch} {fault}" for epoch, said in lines.items() if (fault := _fault(said))]
        last = lines[max(lines)][-1] if lines else ""
        if status["state"] == "done" and last != f"{status['total_steps']}.{LINES - 1}":
            losses.append(f"{run_id}: the last line is {last}")
    return losses, total


def _fault(said: list[str]) -> str:
    """What is wrong with an attempt's lines, which count without a gap from wherever it resumed."""
    first = int(said[0].partition(".")[0])
    expected = [f"{first + at // LINES}.{at % LINES}" for at in range(len(said))]
    if said == expected:
        return ""
    at = next(at for at, (one, other) in enumerate(zip(said, expected, strict=True)) if one != other)
    return f"says {said[at]} where {expected[at]} belongs"


def idle(machine: Machine) -> bool:
    return bool(wait_for(lambda: not any(run["state"] == "running" for run in _runs(machine))))
