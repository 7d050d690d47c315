"""A trainer that speaks the channel and does as its first argument says; no torch, no flash."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

channel = socket.socket(fileno=int(sys.argv[3]))
frames = channel.makefile("r")


def send(**frame: Any) -> None:
    channel.sendall(json.dumps(frame).encode() + b"\n")


def report(kind: str, **data: Any) -> None:
    send(type="report", kind=kind, data=data)


def receive(kind: str) -> dict[str, Any]:
    for line in frames:
        frame = json.loads(line)
        if frame["type"] == kind:
            return frame
    sys.exit("the supervisor is gone")


def call(method: str, **params: Any) -> dict[str, Any]:
    timeout_s = params.pop("timeout_s", None)
    send(type="call", id=1, method=method, params=params, timeout_s=timeout_s)
    return receive("reply")


def checkpoint(step: int, *, final: bool = False) -> None:
    folder = Path(job["work_dir"]) / "checkpoints" / f"step-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights of step %d" % step)
    report("checkpoint", folder=str(folder), step=step, final=final, metrics={"loss": 1.0 / step})


def done() -> None:
    send(type="outcome", outcome="done")


job = receive("job")
mode = sys.argv[1]
if mode in ("ask", "train", "whisper"):  # as a real one, which can't train before it has rows
    info = call("info")
if mode == "fetch":  # a model that comes slowly
    call("info")
    report("phase", phase="loading model")
    for done_bytes in range(0, 5_001, 10):
        report("progress", done_bytes=done_bytes, total_bytes=5_000)
        time.sleep(0.002)
report("phase", phase="training", total_steps=4)

if mode == "train":
    report("log", text=f"info: {json.dumps(info)}")
    for step in range(1, 5):
        report("metrics", step=step, total_steps=4, values={"loss": 1.0 / step, "broken": float("nan")})
    report("eval", base=0.25, adapter=0.75, n=8)
    checkpoint(4, final=True)
    done()
elif mode == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif mode == "exit":
    print("something odd happened", file=sys.stderr, flush=True)
    os._exit(7)
elif mode == "out-of-memory":
    send(type="outcome", outcome="failed", error={"code": "out_of_memory", "message": "no room left on the device"})
elif mode == "invalid":
    send(type="outcome", outcome="failed", error={"code": "invalid_input", "message": "no row fits"})
elif mode == "hang":
    checkpoint(1)
    report("log", text="hanging")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)
elif mode == "obey":
    checkpoint(1)
    report("log", text="waiting")
    receive("stop")
    checkpoint(2)
    send(type="outcome", outcome="stopped")
elif mode == "flood":
    line = b"x" * 99 + b"\n"
    for _ in range(500):
        os.write(1, line * 100)
    os.write(1, b"the end of it\n")
    checkpoint(1, final=True)
    done()
elif mode == "whisper":
    print("the environment:", json.dumps(dict(os.environ)))
    secret = sys.stdin.read() or "sk-canary-9f8e7d6c5b4a"
    for piece in ("a secret ", secret[:7], secret[7:15], secret[15:], " in pieces\n"):
        os.write(1, piece.encode())
        time.sleep(0.05)
    report("log", text=f"the secret is {secret}.")
    report("sample", step=1, nested={secret: [f"<{secret}>"]})
    send(type="outcome", outcome="failed", error={"code": "user_code", "message": f"bad {secret}", "detail": secret})
elif mode == "saves":
    for step in range(1, 7):
        checkpoint(step, final=step == 6)
        time.sleep(0.05)
    done()
elif mode == "slow-call":
    episode = {"messages": [{"role": "assistant", "content": "hang"}], "response_text": "hang"}
    answer = call("score", split="train", index=0, seed=0, timeout_s=0.3, episodes=[episode])
    report("log", text="slow: " + json.dumps(answer))
    report("log", text="next: " + json.dumps(call("info")))
    checkpoint(1, final=True)
    done()
elif mode in ("no-adapter", "fetch"):
    done()
time.sleep(0.02)
