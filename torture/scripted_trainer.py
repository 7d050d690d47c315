"""A trainer without torch: logs numbered lines, saves now and then, ends when told or done.

`train.max_steps` of its spec is the number of steps, `train.save_every` when it saves, `train.batch_size` how
many lines a step logs. A resumed attempt goes on after the step of its checkpoint.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

PAUSE_S = 0.02
channel = socket.socket(fileno=int(sys.argv[-1]))
frames = channel.makefile("r")


def report(kind: str, **data: Any) -> None:
    channel.sendall(json.dumps({"type": "report", "kind": kind, "data": data}).encode() + b"\n")


def save(job: dict[str, Any], step: int, *, final: bool) -> None:
    folder = Path(job["work_dir"]) / "checkpoints" / f"step-{step}"
    for name, body in {"adapter/adapter_model.safetensors": f"weights {step}", "state/state.json": str(step)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
    report("checkpoint", folder=str(folder), step=step, final=final, metrics={})


job = json.loads(frames.readline())
train = job["spec"]["train"]
last = int((Path(job["resume_from"]) / "state" / "state.json").read_text()) if job["resume_from"] else 0
report("phase", phase="training", total_steps=train["max_steps"])
stopped = False
for step in range(last + 1, train["max_steps"] + 1):
    for line in range(train["batch_size"]):
        report("log", text=f"{step}.{line}")
    report("metrics", step=step, total_steps=train["max_steps"], values={"loss": 1 / step})
    final = step == train["max_steps"]
    stopped = bool(select.select([channel], [], [], PAUSE_S)[0])
    if final or stopped or step % train["save_every"] == 0:
        save(job, step, final=final)
    if stopped:
        break
outcome = "stopped" if stopped else "done"
channel.sendall(json.dumps({"type": "outcome", "outcome": outcome}).encode() + b"\n")
time.sleep(0.05)
