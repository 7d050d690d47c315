"""Around training: which devices there are, a worker as a process of its own, and serving on the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tests.inference.test_continuous import adapter_folder, engine_of, serve
from tests.worker.conftest import EPOCH, FAST, RUN_ID, ScriptedPlane, archive, run_spec, until
from tests.worker.conftest import serve as serve_plane
from tests.worker.test_trainer import SUMS

from flash.artifacts.manifests import read_manifest
from flash.artifacts.store import Store
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel
from flash.inference.torch_engine import TorchEngine
from flash.launching.hardware import cuda_devices
from flash.launching.launcher import LaunchRequest, Probe
from flash.launching.local import LocalLauncher
from flash.launching.preload import Preloaded


def test_the_driver_s_devices_are_torch_s(on_cuda: None) -> None:
    found = cuda_devices()
    assert [device.name for device in found] == [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for index, device in enumerate(found):
        properties = torch.cuda.get_device_properties(index)
        assert device.kind == properties.name
        assert device.memory == pytest.approx(properties.total_memory, rel=0.05)


def rows(numbers: range) -> str:
    return "".join(json.dumps({"input": f"{n}+{n}=", "output": str(n + n)}) + "\n" for n in numbers)


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ScriptedPlane]:
    spec = {"batch_size": 4, "max_steps": 4, "epochs": 2, "save_every": 2, "lora_rank": 4}
    files = {"environment.py": SUMS, "dataset/train.jsonl": rows(range(8)), "dataset/eval.jsonl": rows(range(8, 11))}
    scripted = ScriptedPlane(
        store=tmp_path / "store", environment=archive(files), spec=run_spec(**spec), secrets={"SERVICE_KEY": "s" * 20}
    )  # fmt: skip
    scripted.lease_s, scripted.heartbeat_s = 30, 0.2
    server = serve_plane(scripted)
    yield scripted
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("forked", [False, True])
def test_a_worker_that_the_launcher_starts_trains_on_its_device(
    plane: ScriptedPlane, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    monkeypatch.setenv("FLASH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLASH_WORKER_SETTINGS", json.dumps(FAST))
    name = f"cuda:{device.index or 0}" if device.type == "cuda" else str(device)
    preloaded = Preloaded(tmp_path / "preloaded.log", load_s=300)
    if forked:
        preloaded.start()
    launcher = LocalLauncher(tmp_path / "work", devices=[name], preloaded=preloaded)
    attempt_id = f"{RUN_ID}.{EPOCH}"
    work_dir = tmp_path / "work" / RUN_ID / str(EPOCH)
    handle = launcher.launch(LaunchRequest(attempt_id, plane.url, plane.token, str(work_dir), name))
    assert not forked or psutil.Process(int(handle.partition(":")[0])).ppid() == preloaded.pid
    try:
        until(lambda: plane.finish is not None or launcher.probe(handle) is Probe.DEAD, timeout_s=600)
        assert plane.finish is not None, (work_dir / "supervisor.log").read_text()
        assert plane.finish["outcome"] == "done", plane.finish
        until(lambda: launcher.probe(handle) is Probe.DEAD, timeout_s=120)
    finally:
        launcher.kill(handle)
        preloaded.close()
    losses = [data["values"]["loss"] for data in plane.data("metrics") if "loss" in data["values"]]
    assert len(losses) == 4
    assert not [data for data in plane.data("warning") if data["code"] in ("device", "out_of_memory")]
    peak = next(data["values"] for data in plane.data("metrics") if "peak_memory_bytes" in data["values"])
    assert 10**6 < peak["peak_memory_bytes"] < 10**11
    manifest, _ = read_manifest(Store(f"file://{plane.store}"), RUN_ID, 4)
    assert any(file.path.endswith("adapter_model.safetensors") for file in manifest.files)


def test_serving_gives_each_request_what_it_gets_alone(base: BaseModel, tmp_path: Path) -> None:
    """To bf16's rounding: greedy tokens may part where two are almost as likely, so the first ones are compared."""
    folder = adapter_folder(base, tmp_path / "adapter", seed=1, std=0.05)
    prompts = [tuple(range(3 + k, 20 + 3 * k)) for k in range(6)]
    alone = TorchEngine(base)
    alone.load_adapter("one", folder)
    requests = [
        Request(prompt, Sampling(6, temperature=0.0), adapter=("one", None)[number % 2])
        for number, prompt in enumerate(prompts)
    ]
    wanted = alone.generate(requests)
    with engine_of(base) as engine:
        engine.load_adapter("one", folder)
        served = serve(engine, requests)
    for [ours], [theirs] in zip(served, wanted, strict=True):
        assert ours.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=0.1)
    same = sum(ours.tokens == theirs.tokens for [ours], [theirs] in zip(served, wanted, strict=True))
    assert same >= len(requests) // 2
