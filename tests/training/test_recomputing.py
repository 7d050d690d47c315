"""Layers computed again in the backward pass: the same gradients from less memory, and only when nothing else helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.layouts.checkpoints import LAYOUTS, save_checkpoint
from tests.training.test_out_of_memory import gap, memory_warnings, numbers, run_out
from tests.training.test_out_of_memory import run as run  # a fixture

from flash.config.run import RunSpec
from flash.environments.loading import LocalEnvironment
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel, load_base
from flash.inference.torch_engine import TorchEngine
from flash.training.batches import collate
from flash.training.policy import Policy, build_policy
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult, train

ROWS = [list(range(3, 80)), list(range(50, 71))]


def policy_of(name: str, folder: Path, dtype: torch.dtype) -> Policy:
    base = load_base(save_checkpoint(LAYOUTS[name], folder), name=name, device="cpu", dtype=dtype)
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.05, generator=generator)
    return policy


def gradients(policy: Policy) -> tuple[list[torch.Tensor], int]:
    """Log-probabilities and gradients, and the bytes kept between the passes that are no weights."""
    own = {weight.untyped_storage().data_ptr() for weight in [*policy.base.model.parameters(), *policy.parameters()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = collate(ROWS, [[True] * len(row) for row in ROWS], pad_id=policy.base.pad_id, device=policy.base.device)
    with policy.base.adapters.active(policy.name):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs = policy.logprobs(batch)
        found = torch.autograd.grad((logprobs * logprobs.detach().cos()).sum(), policy.parameters())
    return [logprobs.detach(), *found], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradients_stay_and_the_memory_goes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = policy_of(name, tmp_path, dtype)
    before, much = gradients(policy)
    policy.recompute()
    policy.recompute()  # once is enough
    after, little = gradients(policy)
    for one, other in zip(after, before, strict=True):
        assert (one - other).norm() <= (1e-4 if dtype == torch.float32 else 0.02) * other.norm()
    assert little < 0.3 * much


def test_sampling_goes_on_as_before(tmp_path: Path) -> None:
    policy = policy_of("Qwen3.5", tmp_path, torch.float32)
    requests = [Request(tuple(row[:20]), Sampling(6, seed=1), n=2, adapter=policy.name) for row in ROWS]
    before = TorchEngine(policy.base).generate(requests)
    policy.recompute()
    assert TorchEngine(policy.base).generate(requests) == before


class Room:
    """A device with room for `most` bytes kept of a micro-batch for its backward pass; `seen` is the most there was."""

    def __init__(self, base: BaseModel, most: float) -> None:
        self.most, self.seen, self._now = most, 0, 0
        self._begin = base.model.get_input_embeddings().register_forward_pre_hook(self._reset)
        self._keeping = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _reset(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._now = 0

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._now += tensor.nbytes
        if self._now > self.most:
            run_out()
        self.seen = max(self.seen, self._now)
        return tensor

    def __enter__(self) -> Room:
        self._keeping.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._keeping.__exit__()
        self._begin.remove()


def test_a_row_that_does_not_fit_alone_is_computed_twice(base: BaseModel, run: Callable[..., Any], spec: Any) -> None:
    with Room(base, float("inf")) as room:
        whole, _ = run(spec(max_steps=4), "whole", micro_batch_divisor=1 << 20)  # a row at a time
    with Room(base, room.seen / 2) as small_room:
        small, reporter = run(spec(max_steps=4), "small")
    assert small_room.seen <= room.seen / 2
    assert numbers(reporter) == [1, 2, 3, 4] and "each layer computed again" in memory_warnings(reporter)[-1]
    assert gap(small, whole) < 1e-5


def test_a_resumed_run_goes_on_computing_twice(
    tiny_folder: Path, run_on: Callable[..., Any], base: BaseModel, spec: Any
) -> None:
    with Room(base, float("inf")) as room:
        run_on(base, spec(max_steps=1), "row", micro_batch_divisor=1 << 20)
    bases = [load_base(tiny_folder, name="flash/nano", device="cpu") for _ in range(3)]
    results, told = [], []
    for number, (each, stop_at) in enumerate(zip(bases, (None, 2, None), strict=True)):
        options = {"resume_from": results[1].checkpoint} if number == 2 else {}
        reporter = RecordingReporter(stop_at=stop_at)
        with Room(each, room.seen / 2):
            results.append(run_on(each, spec(max_steps=4), f"run-{number}", reporter, **options))
        told.append(memory_warnings(reporter))
    assert told[0] and told[1] and not told[2]
    for name in ("adapter/adapter_model.safetensors", "state/optimizer.safetensors"):
        assert (results[2].checkpoint / name).read_bytes() == (results[0].checkpoint / name).read_bytes()


@pytest.fixture
def run_on(environment: LocalEnvironment, tmp_path: Path) -> Callable[..., TrainResult]:
    """run_on(base, spec, name, reporter, …): SFT on a base of one's own."""

    def start(
        base: BaseModel, spec: RunSpec, name: str, reporter: RecordingReporter | None = None, **options: Any
    ) -> TrainResult:
        (tmp_path / name).mkdir()
        return train(spec, base, environment, reporter or RecordingReporter(), work_dir=tmp_path / name, **options)

    return start
