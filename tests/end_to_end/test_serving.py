"""Serving through the real command and the real engine: train, deploy, chat, restart, lose, undeploy."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.end_to_end.test_walking_path import Machine

from flash.artifacts.manifests import fetch_checkpoint, read_manifest, write_checkpoint
from flash.artifacts.store import Store
from flash.storage import runs
from flash.storage.database import Database

pytestmark = pytest.mark.slow


def until(holds: Any, limit_s: float = 120) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.2)
    return found


class Serving(Machine):
    def train(self, *arguments: object) -> str:
        out = self.flash("train", "echo.toml", "--background", "--json", *arguments)
        return str(json.loads(out)["run_id"])

    def hosts(self) -> list[psutil.Process]:
        return self.processes("flash.serving.host")

    def api(self) -> httpx.Client:
        """The address and the key as `flash deployments --json` gives them."""
        [live] = json.loads(self.flash("deployments", "--json"))["deployments"]
        key = Path(live["token_file"]).read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=live["base_url"], headers=headers, timeout=120, trust_env=False)


def ask(model: str, text: str = "Say red.", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[Serving]:
    machine = Serving(tmp_path_factory.mktemp("serving"))
    yield machine
    machine.flash("server", "stop")
    for process in machine.processes():
        process.kill()


@pytest.fixture(scope="module")
def deployed(machine) -> str:
    """A run of two steps, deployed."""
    machine.flash("env", "push", "--name", "echo", "echo")
    run_id = machine.train("--set", "train.max_steps=4")
    machine.flash("status", run_id, "-f")
    assert machine.flash("deploy", run_id).strip() == f"{run_id}/step-4"
    return run_id


def test_train_deploy_chat(machine, deployed):
    assert machine.status(deployed)["deployment"] == f"{deployed}/step-4"
    said = json.loads(machine.flash("chat", deployed, "-m", "Say red.", "--max-tokens", 16, "--json"))
    assert said["checkpoint"] == f"{deployed}/step-4" and said["content"]
    assert machine.flash("chat", deployed, "-m", "Say red.", "--max-tokens", 16) == said["content"] + "\n"
    assert machine.flash("chat", "flash/nano", "-m", "What is 2 + 3?", "--max-tokens", 16).strip()
    with machine.api() as http:
        answer = http.post("/chat/completions", json=ask(deployed, max_tokens=16))
        assert answer.json()["choices"][0]["message"]["content"] == said["content"]
        assert answer.headers["x-freesolo-checkpoint"] == f"{deployed}/step-4"
        pinned = {"X-Freesolo-Expected-Checkpoint": f"{deployed}/step-2"}
        assert http.post("/chat/completions", json=ask(deployed), headers=pinned).status_code == 409
        early = http.post("/chat/completions", json=ask(f"{deployed}/step-2", max_tokens=1))
        assert early.headers["x-freesolo-checkpoint"] == f"{deployed}/step-2"
        assert deployed in [each["id"] for each in http.get("/models").json()["data"]]


def test_a_checkpoint_is_deployed_while_its_run_trains(machine, deployed):
    run_id = machine.train("--set", "train.epochs=100000", "--seed", 3)
    until(lambda: machine.flash("checkpoints", run_id))
    refused = machine.begin("deploy", run_id)
    _, told = refused.communicate(timeout=100)
    step = json.loads(machine.flash("checkpoints", run_id, "--json"))["checkpoints"][0]["step"]
    assert refused.returncode == 1 and f"flash deploy {run_id}/step-" in told
    assert machine.flash("deploy", f"{run_id}/step-{step}").strip() == f"{run_id}/step-{step}"
    assert machine.flash("chat", run_id, "-m", "Say red.", "--max-tokens", 4)
    assert machine.status(run_id)["state"] == "running"
    machine.flash("cancel", run_id)
    machine.flash("status", run_id, "-f", code=1)
    assert machine.flash("chat", run_id, "-m", "Say red.", "--max-tokens", 4), "a cancelled run's adapter stays"
    machine.flash("undeploy", run_id)
    machine.flash("chat", run_id, "-m", "Say red.", code=1)


def test_a_host_killed_in_mid_stream_is_a_clean_error_and_the_next_request_works(machine, deployed):
    machine.flash("chat", deployed, "-m", "Say red.", "--max-tokens", 1)
    [host] = machine.hosts()
    with machine.api() as http:
        body = ask("flash/nano", "Count.", stream=True, max_tokens=4000, temperature=1.0, n=8)
        with http.stream("POST", "/chat/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
            assert "choices" in json.loads(next(lines)[6:])
            host.send_signal(signal.SIGKILL)
            last = list(lines)[-1]
        assert "lost in the middle" in json.loads(last[6:])["error"]["message"]
        assert http.post("/chat/completions", json=ask(deployed, max_tokens=4)).status_code == 200


def test_the_address_outlives_the_server(machine, deployed):
    with machine.api() as http:
        before = http.base_url
        machine.flash("server", "stop")
        with pytest.raises(httpx.ConnectError):
            http.get("/models")
        machine.flash("server", "start")
        assert http.post("/chat/completions", json=ask(deployed, max_tokens=4)).status_code == 200
    with machine.api() as http:
        assert http.base_url == before


def test_a_broken_adapter_is_not_deployed(machine, deployed, tmp_path):
    machine.flash("server", "stop")
    store = Store((machine.home / "artifacts").as_uri())
    manifest, _ = read_manifest(store, deployed, 2)
    fetch_checkpoint(store, manifest, tmp_path / "copy", only="adapter")
    weights = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, float("nan")) for name, value in load_file(weights).items()}, weights)
    broken, sha256 = write_checkpoint(store, deployed, 3, tmp_path / "copy", False, {})
    database = Database(f"sqlite:///{machine.home / 'flash.db'}")
    with database.write() as connection:
        # The run has ended, which a checkpoint's event would not survive: the row is what matters here.
        row = {"run_id": deployed, "step": 3, "final": False, "epoch": 1, "created_at": time.time()}
        row |= {"manifest_sha256": sha256, "manifest": broken.model_dump(mode="json"), "has_state": False}
        connection.execute(runs.schema.checkpoints.insert().values(**row))
    database.close()
    refused = machine.begin("deploy", f"{deployed}/step-3")
    _, told = refused.communicate(timeout=110)
    assert refused.returncode == 1, told
    assert f"{deployed}/step-4 stays live" in told and len([x for x in told.splitlines() if "error:" in x]) == 1
    assert machine.status(deployed)["deployment"] == f"{deployed}/step-4"


def test_an_idle_engine_leaves_and_comes_back(machine, deployed):
    machine.flash("server", "stop")
    machine.variables["FLASH_SERVER_ENGINE_IDLE_S"] = "2"
    machine.flash("chat", deployed, "-m", "Say red.", "--max-tokens", 1)
    until(lambda: not machine.hosts())
    assert machine.flash("deployments").split()[-1] == "idle"
    assert machine.flash("chat", deployed, "-m", "Say red.", "--max-tokens", 4)
    assert machine.flash("undeploy", deployed)
    assert machine.flash("deployments") == ""
