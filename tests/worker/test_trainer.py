"""The real trainer: under the real supervisor, where `flash/nano` learns for a few steps, and by itself."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash.artifacts.manifests import read_manifest
from flash.artifacts.store import Store
from flash.catalog import catalog
from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.errors import ModelError
from flash.records import EvalReport, Phase
from flash.worker.channel import Channel
from flash.worker.environment_host import EnvironmentHost, HostSpec
from flash.worker.trainer import ChannelReporter, named, run

RUN = "flash-1700000000-0000abcd"
SUMS = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult

class Sums(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        return RewardResult(score=float(response.strip() == example.output))

def load_environment():
    return Sums()
"""


def rows(numbers):
    return "".join(json.dumps({"input": f"{n}+{n}=", "output": str(n + n)}) + "\n" for n in numbers)


def test_an_attempt_trains_and_a_resumed_one_ends_with_the_same_adapter(plane, attempt, spec_of):
    plane.ship(SUMS, **{"dataset/train.jsonl": rows(range(8)), "dataset/eval.jsonl": rows(range(8, 11))})
    plane.spec = spec_of(batch_size=4, max_steps=4, epochs=2, save_every=2, lora_rank=4)
    plane.lease_s, plane.heartbeat_s = 30, 0.2
    first = attempt()
    assert first.wait(100) == 0, first.said()
    assert plane.finish["outcome"] == "done", plane.finish
    steps = [data for data in plane.data("metrics") if "loss" in data["values"]]
    assert [(data["step"], data["total_steps"]) for data in steps] == [(step, 4) for step in (1, 2, 3, 4)]
    assert [data["phase"] for data in plane.data("phase")] == [
        "preparing environment", "loading model", "preparing data", "training", "evaluating",
    ]  # fmt: skip
    assert plane.data("warning") == []
    [report] = plane.data("eval")
    assert report["n"] == 3
    assert (plane.checkpoints[-1]["step"], plane.checkpoints[-1]["final"]) == (4, True)

    store = Store(f"file://{plane.store}")
    final, _ = read_manifest(store, RUN, 4)
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= {file.path for file in final.files}
    assert any(file.path.startswith("state/") for file in final.files)

    # A second attempt from step 2, as after a crash: it must write the very bytes of the uninterrupted one.
    plane.resume_from = read_manifest(store, RUN, 2)[0].model_dump(mode="json")
    store.delete(f"runs/{RUN}/checkpoints/step-4.json")
    plane.events, plane.checkpoints, plane.finish = [], [], None
    second = attempt(folder="second")
    assert second.wait(100) == 0, second.said()
    assert plane.finish["outcome"] == "done", plane.finish
    assert sorted({data["step"] for data in plane.data("metrics")}) == [3, 4]
    again, _ = read_manifest(store, RUN, 4)
    assert {file.path: file.sha256 for file in again.files} == {file.path: file.sha256 for file in final.files}


def connected():
    """A reporter, and the frames that its supervisor gets."""
    ours, theirs = socket.socketpair()
    frames = []
    supervisor = Channel(theirs, on_frame=frames.append).start()
    return Channel(ours).start(), supervisor, frames


def test_reports_reach_the_supervisor_as_they_were_made(tmp_path):
    channel, supervisor, frames = connected()
    stop = threading.Event()
    reporter = ChannelReporter(channel, stop)
    reporter.phase(Phase.TRAINING, total_steps=9)
    reporter.metrics(3, {"loss": torch.tensor(0.5).item()})
    reporter.checkpoint(tmp_path / "step-3", step=3, final=False, metrics={"loss": 0.5}, seconds=0.25)
    reporter.evaluation(EvalReport(base=0.25, adapter=0.75, n=4))
    reporter.sample(3, {"text": "hi"})
    channel.close()
    supervisor.wait_closed(5)
    assert 0.01 < frames[1]["data"]["values"].pop("memory_gb") < 100
    assert [(frame["kind"], frame["data"]) for frame in frames] == [
        ("phase", {"phase": "training", "total_steps": 9}),
        ("metrics", {"step": 3, "total_steps": 9, "values": {"loss": 0.5}}),
        ("metrics", {"step": 3, "total_steps": 9, "values": {"seconds_checkpoint": 0.25}}),
        ("checkpoint", {"folder": str(tmp_path / "step-3"), "step": 3, "final": False, "metrics": {"loss": 0.5}}),
        ("eval", {"base": 0.25, "adapter": 0.75, "n": 4}),
        ("sample", {"text": "hi", "step": 3}),
    ]
    assert not reporter.should_stop()
    stop.set()
    assert reporter.should_stop()


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """train_here({config}): the trainer in this process with a real environment host; what it reported, by kind."""
    monkeypatch.setenv("FLASH_HOME", str(tmp_path / "home"))

    def start(**config):
        folder = tmp_path / f"job-{len(list(tmp_path.iterdir()))}"
        (folder / "environment" / "dataset").mkdir(parents=True)
        (folder / "environment" / "environment.py").write_text(SUMS)
        (folder / "environment" / "dataset" / "train.jsonl").write_text(rows(range(4)))
        parsed, _ = parse_config({"model": "flash/nano", "environment": {"id": "local/sums"}, **config})
        host = EnvironmentHost(
            HostSpec(folder=folder / "environment", work_dir=folder, params={}, variables={})
        )
        ours, theirs = socket.socketpair()
        frames = []
        supervisor = Channel(theirs, on_call=host.call, on_frame=frames.append).start()
        channel = Channel(ours).start()
        spec = resolve(parsed, seed=0).model_dump(mode="json")
        job = {"spec": spec, "threads": 1, "device": "cpu", "work_dir": str(folder)}
        try:
            outcome = run(job, channel, threading.Event())
        finally:
            channel.close()
            supervisor.wait_closed(5)
            host.close()
        assert outcome["outcome"] == "done", outcome
        return {kind: [f["data"] for f in frames if f["kind"] == kind] for kind in ("metrics", "checkpoint", "log")}

    return start


TINY_SFT = {"max_steps": 1, "lora_rank": 2, "batch_size": 4}
TINY_GRPO = {"steps": 1, "lora_rank": 2, "batch_size": 1, "group_size": 2, "max_tokens": 3}


def test_the_model_is_the_one_that_the_config_names(train_here, tmp_path):
    """A base that knows nothing, by an operator's own entry: its first loss is that of guessing."""
    shutil.copytree(Path(catalog.__file__).with_name("nano"), tmp_path / "mute")
    weights = tmp_path / "mute" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, weights, {"format": "pt"})
    shipped = Path(catalog.__file__).with_name("models.toml").read_text().split("[[model]]")[1]
    entry = shipped.replace('"flash/nano"', '"acme/mute"').replace('path = "nano"', f'path = "{tmp_path / "mute"}"')
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models.toml").write_text(f"[[model]]{entry}")
    losses, adapters = {}, {}
    for model in ("flash/nano", "acme/mute"):
        told = train_here(model=model, train=TINY_SFT)
        losses[model] = told["metrics"][0]["values"]["loss"]
        adapters[model] = Path(told["checkpoint"][-1]["folder"]) / "adapter" / "adapter_config.json"
    assert losses["acme/mute"] == pytest.approx(math.log(640), rel=1e-3) and losses["flash/nano"] < 3
    assert {model: json.loads(path.read_text())["base_model_name_or_path"] for model, path in adapters.items()} == {
        "flash/nano": "flash/nano", "acme/mute": "acme/mute",
    }  # fmt: skip


def test_the_algorithm_decides_what_is_trained_on(train_here):
    imitated = train_here(algorithm="sft", train=TINY_SFT)
    sampled = train_here(algorithm="grpo", train=TINY_GRPO)
    assert "trained tokens" in imitated["log"][0]["text"] and "reward" not in imitated["metrics"][0]["values"]
    assert "reward" in sampled["metrics"][0]["values"]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "train"), [("sft", TINY_SFT), ("grpo", TINY_GRPO)])
def test_a_real_run_is_logged_to_wandb(plane, attempt, algorithm, train):
    plane.ship(SUMS, **{"dataset/train.jsonl": rows(range(4)), "dataset/eval.jsonl": rows(range(4, 6))})
    parsed, _ = parse_config(
        {"model": "flash/nano", "algorithm": algorithm, "environment": {"id": "local/sums"}, "train": train,
         "worker_env": {"WANDB_MODE": "offline"}}
    )  # fmt: skip
    plane.spec = resolve(parsed, seed=0).model_dump(mode="json")
    plane.secrets["WANDB_API_KEY"] = "0123456789" * 4
    plane.lease_s, plane.heartbeat_s = 30, 0.2
    run = attempt(logger_wait_s=60)
    assert run.wait(100) == 0, run.said()
    assert plane.finish["outcome"] == "done", plane.finish
    written = b"".join(path.read_bytes() for path in (run.home / "wandb").rglob("*.wandb"))
    named = plane.data("metrics")[0]["values"]
    assert all(name.encode() in written for name in [*named, "eval/base", "eval/adapter"])


def test_a_model_that_is_not_there_is_named(spec_of, tmp_path):
    channel, supervisor, _ = connected()
    spec = {**spec_of(), "model": "nobody/nothing"}
    outcome = run({"spec": spec, "threads": 1, "device": "cpu", "work_dir": str(tmp_path)}, channel, threading.Event())
    assert (outcome["outcome"], outcome["error"]["code"]) == ("failed", ModelError.code)
    assert "nobody/nothing" in outcome["error"]["message"]
    channel.close()
    supervisor.wait_closed(5)


def test_memory_that_runs_out_is_told_from_a_defect():
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        assert named(error).code == "out_of_memory"
    assert named(MemoryError()).code == "out_of_memory"
    defect = named(KeyError("rows"))
    assert (defect.code, defect.message) == ("internal", "training failed: KeyError: 'rows'")
    assert "KeyError" in defect.detail


def test_a_trainer_without_its_supervisor_ends():
    ours, theirs = socket.socketpair()
    with subprocess.Popen(
        [sys.executable, "-m", "flash.worker.trainer", "--fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
    ) as process:
        theirs.close()
        ours.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == b""


def test_peak_memory_leaves_out_what_the_process_that_started_this_one_held() -> None:
    child = "from flash.worker.trainer import peak_memory; own = bytearray(50 << 20); print(peak_memory('cpu') >> 20)"
    parent = "import subprocess, sys; held = b'x' * (500 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    answer = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 50 < int(answer.stdout) < 300, answer
