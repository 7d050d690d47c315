"""A checkpoint folder: the adapter that people use, and the state that an exact resume needs.

    step-N/adapter/  adapter_model.safetensors, adapter_config.json, flash.json, README.md
    step-N/state/    optimizer.safetensors, rng.safetensors, state.json

Owns the folder's form, and that it appears whole or not at all. Safetensors and JSON only: reading a
checkpoint runs no code. Knows nothing of uploads, stores or when to save.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash.config.run import RunSpec
from flash.errors import ModelError
from flash.failpoints import failpoint
from flash.inference.lora import save_adapter
from flash.training.policy import Policy

ADAPTER, STATE = "adapter", "state"


@dataclass(frozen=True)
class Provenance:
    """What an adapter says about where it comes from."""

    spec: RunSpec
    environment_digest: str
    base_revision: str | None


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    return work_dir / "checkpoints" / f"step-{step}"


def write_checkpoint(
    work_dir: Path,
    *,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    provenance: Provenance,
    metrics: Mapping[str, float],
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `checkpoints/step-N` under `work_dir` and returns it, on disk and complete.

    `metrics` go into `flash.json`, so they should be a pure function of the run (no times). `extra` (JSON)
    and `tensors` are the algorithm's own state, given back by `read_state`.
    """
    folder = checkpoint_folder(work_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    _write_adapter(building / ADAPTER, step, policy, provenance, metrics)
    failpoint("checkpoint.adapter")
    _write_state(building / STATE, step, optimizer, extra or {}, tensors or {})
    _sync(building)
    failpoint("checkpoint.synced")
    shutil.rmtree(folder, ignore_errors=True)  # a resumed attempt writes the same step again
    building.rename(folder)
    _sync_folder(folder.parent)
    failpoint("checkpoint.renamed")
    return folder


@dataclass(frozen=True)
class SavedState:
    """What `write_checkpoint` kept besides the adapter."""

    step: int
    extra: dict[str, Any]
    tensors: dict[str, Tensor]
    _optimizer: dict[str, Tensor]
    _generators: dict[str, Tensor]
    _python_random: Any

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer its moments back; its parameters must be those of the saved adapter."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._optimizer.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        if state and set(state) != set(groups[0]["params"]):
            raise ModelError("the checkpoint's optimizer state does not belong to its adapter")
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def restore_generators(self) -> None:
        """Sets Python's and torch's generators to where they stood."""
        version, words, gauss = self._python_random
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(self._generators["cpu"])
        for device in range(torch.cuda.device_count()):
            if (saved := self._generators.get(f"cuda.{device}")) is not None:
                torch.cuda.set_rng_state(saved, device)


def read_state(folder: Path) -> SavedState:
    """Raises ModelError when the folder has no complete state."""
    state = folder / STATE
    try:
        document = json.loads((state / "state.json").read_text(encoding="utf-8"))
        return SavedState(
            step=int(document["step"]),
            extra=document["extra"],
            tensors=load_file(state / "extra.safetensors"),
            _optimizer=load_file(state / "optimizer.safetensors"),
            _generators=load_file(state / "rng.safetensors"),
            _python_random=document["python_random"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder.name} can't be resumed from: {error}") from error


def _write_adapter(
    folder: Path, step: int, policy: Policy, provenance: Provenance, metrics: Mapping[str, float]
) -> None:
    base = policy.base
    save_adapter(policy.adapter, folder, base_model=base.name, revision=provenance.base_revision)
    document = {
        "format": 1,
        "base_model": base.name,
        "base_revision": provenance.base_revision,
        "environment_digest": provenance.environment_digest,
        "step": step,
        "metrics": dict(metrics),
        "spec": provenance.spec.model_dump(mode="json"),
    }
    (folder / "flash.json").write_text(_json(document), encoding="utf-8")
    (folder / "README.md").write_text(model_card(step, base.name, provenance, metrics), encoding="utf-8")


def _write_state(
    folder: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    folder.mkdir(parents=True)
    moments = {
        f"{index}.{key}": value.detach().contiguous().cpu()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    generators = {"cpu": torch.get_rng_state()}
    for device in range(torch.cuda.device_count()):
        generators[f"cuda.{device}"] = torch.cuda.get_rng_state(device)
    save_file(moments, folder / "optimizer.safetensors")
    save_file(generators, folder / "rng.safetensors")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / "extra.safetensors")
    document = {"format": 1, "step": step, "extra": dict(extra), "python_random": random.getstate()}
    (folder / "state.json").write_text(_json(document), encoding="utf-8")


def model_card(step: int, base_model: str, provenance: Provenance, metrics: Mapping[str, float]) -> str:
    """The adapter's README.md, with the front matter that model hubs read."""
    spec = provenance.spec
    method = {"sft": "supervised fine-tuning", "grpo": "reinforcement learning (GRPO)"}[spec.algorithm]
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
    return f"""---
base_model: {base_model}
library_name: peft
pipeline_tag: text-generation
tags: [lora, {spec.algorithm}]
---
# LoRA adapter for {base_model}

Trained with Flash by {method} on the environment `{spec.environment.id}`, up to step {step}.

| setting | value |
|---|---|
| base revision | {provenance.base_revision or "local"} |
| rank, alpha | {spec.train.lora_rank}, {spec.train.lora_alpha} |
| learning rate | {spec.train.learning_rate:g} ({spec.recipe.lr_schedule}) |
| batch size | {spec.train.batch_size} |
| max length | {spec.train.max_length} |
| thinking | {"on" if spec.thinking else "off"} |
| seed | {spec.seed} |
| environment digest | {provenance.environment_digest} |

| metric at this step | value |
|---|---|
{rows}

It loads with PEFT: `PeftModel.from_pretrained(base, folder)`. `flash.json` holds the whole specification.
"""


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _sync(folder: Path) -> None:
    """Forces every file and folder below onto the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
