"""A run whose artifacts live in a bucket that fails now and then, and whose worker dies once: it ends `done` and is
served, whether worker and engine have the bucket's keys or addresses that the server signs."""

from __future__ import annotations

import hashlib
import random

import pytest
from torture.bucket import NAME, Bucket
from torture.machine import Machine, wait_for
from torture.resuming import SFT

TRAIN = {**SFT, "epochs": 100, "max_steps": 30, "save_every": 3}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("reached_by", ["keys", "signed"])
def test_a_run_on_a_failing_bucket(tmp_path, reached_by):
    with Bucket(random.Random(5)) as bucket:
        options = ",".join(f"{name}={value}" for name, value in bucket.options.items())
        machine = Machine(
            tmp_path / "home", FLASH_SERVER_STORE_URL=bucket.url, FLASH_SERVER_STORE_OPTIONS=options,
            FLASH_SERVER_WORKER_STORE=reached_by,
        )  # fmt: skip
        try:
            machine.start()
            machine.push()
            run_id = machine.submit(TRAIN)
            bucket.rate = 0.1
            wait_for(lambda: machine.status(run_id)["checkpoints"], 200)
            machine.processes(run_id, "flash.worker.supervisor")[0].kill()
            status = machine.ended(run_id, 250)
            bucket.rate = 0.0
            assert status["state"] == "done", status["summary"]
            assert bucket.injected, "the bucket did fail"
            assert len(status["attempts"]) > 1 and not (machine.home / "artifacts").exists()
            assert status["managed"]["artifact_uri"] == f"s3://{NAME}/team/runs/{run_id}"
            files = machine.call("GET", f"/api/runs/{run_id}/adapter")["files"]
            assert {file["path"] for file in files} >= {"adapter/adapter_model.safetensors", "adapter/flash.json"}
            for file in files:
                body = machine.http.get(f"/api/runs/{run_id}/adapter/files/{file['path']}").content
                assert hashlib.sha256(body).hexdigest() == file["sha256"]
            deploy = {"json": {"run_id": run_id}, "timeout": 60}
            wait_for(lambda: machine.http.post("/api/deployments", **deploy).status_code == 201, 100)
            asked = {"model": run_id, "messages": [{"role": "user", "content": "say 1"}], "max_tokens": 4}
            assert machine.call("POST", "/v1/chat/completions", json=asked, timeout=60)["choices"]
            told = [event["seq"] for event in machine.events(run_id)]
            assert told == list(range(1, len(told) + 1))
        finally:
            machine.close()
