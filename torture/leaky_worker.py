"""A worker that redacts nothing: it claims, says its run's secret in every way it can, and fails saying it."""

import json
import sys
from pathlib import Path

import httpx

from flash.artifacts.manifests import write_checkpoint
from flash.artifacts.store import Store

start = json.loads(sys.stdin.readline())
run_id, _, epoch = start["attempt_id"].rpartition(".")
http = httpx.Client(
    base_url=f"{start['api_url']}/worker/attempts/{start['attempt_id']}/",
    headers={"Authorization": f"Bearer {start['token']}"},
    trust_env=False,
)


def post(path: str, **body: object) -> None:
    http.post(path, json={"epoch": int(epoch), **body}).raise_for_status()


claim = http.post("claim", json={"pid": 1, "device": "cpu"}).raise_for_status().json()
secret = claim["secrets"]["SERVICE_KEY"]
said = [
    ("log", {"stream": "trainer", "text": f"plain {secret}"}),
    ("log", {"stream": "trainer", "text": f"cut here {secret[:12]}"}),
    ("log", {"stream": "trainer", "text": f"{secret[12:]} and on"}),
    ("log", {"stream": secret, "text": json.dumps({"key": secret})}),
    ("warning", {"code": "leak", "text": secret}),
    ("metrics", {"step": 1, "total_steps": 2, "values": {secret: 1.0, "loss": 2.0}}),
    ("eval", {"base": 0.0, "adapter": 1.0, "n": 1, secret: [secret]}),
    ("sample", {"step": 1, "messages": [{"role": "user", "content": secret}], "reward": 0.5}),
]
events = [{"n": n, "time": 0.0, "kind": kind, "data": data} for n, (kind, data) in enumerate(said, 1)]
post("events", events=events)
post("heartbeat", phase="training", step=1, progress=1)
saved = Path(start["work_dir"]) / "step-1"
for name in ("adapter/weights", "state/optimizer"):
    (saved / name).parent.mkdir(parents=True, exist_ok=True)
    (saved / name).write_bytes(b"weights")
_, sha256 = write_checkpoint(Store(claim["store_url"]), run_id, 1, saved, False, {f"reward/{secret}": 1.0})
post("checkpoints", step=1, final=False, manifest_sha256=sha256)
# What it had still to say lies in its spool, where the plane finds it once it is dead.
spool = Path(start["work_dir"]) / "spool" / "events.jsonl"
spool.parent.mkdir(parents=True, exist_ok=True)
late = {"n": len(said) + 1, "time": 0.0, "kind": "log", "data": {"stream": "trainer", "text": f"late {secret}"}}
spool.write_text("".join(json.dumps(event) + "\n" for event in [*events, late]))
error = {"code": "user_code", "message": f"no {secret}", "remedy": secret, "detail": f"Traceback\n{secret}"}
post("finish", outcome="failed", failure="user_code", error=error)
