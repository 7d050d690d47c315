"""A checkpoint folder: whole or absent, free of pickle, and back to the same bits."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flash.errors import ModelError
from flash.inference.loading import BaseModel
from flash.training.checkpoints import Provenance, checkpoint_folder, read_state, write_checkpoint
from flash.training.optimizer import build_optimizer
from flash.training.policy import Policy, build_policy


def stepped(policy: Policy, spec) -> torch.optim.Optimizer:
    optimizer = build_optimizer(policy.parameters(), spec.recipe, learning_rate=1e-2)
    for number, parameter in enumerate(policy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
    optimizer.step()
    return optimizer


@pytest.fixture
def save(base: BaseModel, spec, tmp_path: Path):
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    optimizer = stepped(policy, spec())

    def write(step: int = 3, **more) -> Path:
        provenance = Provenance(spec(), "cd" * 32, None)
        return write_checkpoint(
            tmp_path, step=step, policy=policy, optimizer=optimizer, provenance=provenance,
            metrics={"loss": 0.5}, **more,
        )

    return write


def test_everything_comes_back(save, base, spec) -> None:
    random.seed(4)
    torch.manual_seed(5)
    folder = save(extra={"rows": [1, 2]}, tensors={"buffer": torch.arange(6)})
    drawn = random.random(), torch.rand(3).tolist()
    saved = read_state(folder)
    assert saved.step == 3 and saved.extra == {"rows": [1, 2]}
    assert saved.tensors["buffer"].tolist() == list(range(6))
    saved.restore_generators()
    assert (random.random(), torch.rand(3).tolist()) == drawn

    policy = build_policy(base, rank=4, alpha=8, seed=1, init_from=folder / "adapter")
    fresh = build_optimizer(policy.parameters(), spec().recipe, learning_rate=1e-2)
    saved.restore_optimizer(fresh)
    original = stepped(build_policy(base, rank=4, alpha=8, seed=0), spec())
    ours, theirs = fresh.state_dict()["state"], original.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[number][key], theirs[number][key]) for number in theirs for key in theirs[number])


def test_reading_runs_no_code(save) -> None:
    kinds = {path.suffix for path in save().rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".md"}


def test_nothing_half_written_is_left_and_a_second_save_replaces(save, tmp_path) -> None:
    folder = save()
    leftover = folder.with_name(f".{folder.name}.{os.getpid()}")  # of a save that was killed
    leftover.mkdir()
    again = save(extra={"second": True})
    assert again == folder == checkpoint_folder(tmp_path, 3)
    assert read_state(again).extra == {"second": True}
    assert [path.name for path in folder.parent.iterdir()] == ["step-3"]


def test_the_adapter_keeps_to_what_servers_accept(save) -> None:
    folder = save() / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"], config["use_dora"]) == (None, "none", False)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "rng.safetensors"])
def test_torn_state_is_one_clear_line(name: str, save) -> None:
    folder = save()
    path = folder / "state" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="step-3 can't be resumed from"):
        read_state(folder)


def test_another_adapters_optimizer_is_refused(save, base, spec) -> None:
    saved = read_state(save())
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    optimizer = build_optimizer(policy.parameters()[:4], spec().recipe, learning_rate=1e-2)
    with pytest.raises(ModelError, match="does not belong"):
        saved.restore_optimizer(optimizer)


def test_a_save_is_quick(save) -> None:
    save()
    started = time.perf_counter()
    save(step=4)
    assert time.perf_counter() - started < 1.0  # a bound against accidents; a few ms are usual
