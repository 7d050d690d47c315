"""Memory on the device: the estimate against the peak of a true shape, and going on after running out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.catalog.layouts import config_of, entry_of, spec_of
from tests.gpu.conftest import Run, steps
from tests.training.conftest import save_tiny, sft_spec, write_package
from tests.training.test_out_of_memory import memory_warnings, room_for
from transformers import AutoModelForCausalLM

from flash.catalog.catalog import ModelEntry, load_catalog
from flash.catalog.fit import memory_needed
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapters
from flash.inference.memory import release
from flash.training.batches import collate
from flash.training.losses import negative_log_likelihood
from flash.training.optimizer import Gradients, build_optimizer, optimizer_step
from flash.training.policy import build_policy

TRUE_SHAPE = "Qwen/Qwen3.5-0.8B"
CONTEXT = 600_000_000  # bytes of the driver's context, which torch doesn't count; within the estimate's runtime


def made_up(entry: ModelEntry, device: torch.device) -> BaseModel:
    """A model of the entry's shape in bf16, with random weights, made where it will be."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(entry), dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to_empty(device=device).eval()
    model.tie_weights()  # to_empty gives tied weights memory of their own
    generator = torch.Generator(device).manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point():
            continue
        with torch.no_grad():
            value.fill_(1.0) if "norm" in name or value.dim() < 2 else value.normal_(std=0.02, generator=generator)
    _fill_rotations(model)
    tokens = entry.context
    return BaseModel(entry.id, None, model, None, Adapters(model), (0,), 0, tokens, device, torch.bfloat16)


def _fill_rotations(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(found := getattr(module, name, None), torch.Tensor):
                with torch.no_grad():
                    found.copy_(1e4 ** -torch.linspace(0, 1, len(found)))


def two_steps(base: BaseModel, entry: ModelEntry, *, rows: int, tokens: int, rank: int) -> None:
    spec = spec_of(entry, "sft", max_length=tokens, batch_size=rows, lora_rank=rank)
    policy = build_policy(base, rank=rank, alpha=rank, seed=0)
    optimizer = build_optimizer(policy.parameters(), spec.recipe, learning_rate=1e-4)
    made = [[(3 + 7 * place + row) % 500 for place in range(tokens)] for row in range(rows)]
    batch = collate(made, [[False] * 8 + [True] * (tokens - 8)] * rows, pad_id=0, device=base.device)
    for step in (1, 2):
        gradients = Gradients(policy.parameters())
        with base.adapters.active(policy.name):
            gradients.add(negative_log_likelihood(policy.logprobs(batch), normaliser=rows * tokens))
        gradients.apply()
        norm = optimizer_step(optimizer, policy.parameters(), rate=1e-4, max_grad_norm=1.0, step=step)
        assert norm > 0


def test_steps_of_a_made_up_model_are_sound(device: torch.device) -> None:
    entry = entry_of("qwen3_5")
    two_steps(made_up(entry, device), entry, rows=2, tokens=96, rank=8)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1024), (4, 1024)])
def test_the_estimate_is_the_peak_of_a_true_shape(
    rows: int, tokens: int, device: torch.device, on_cuda: None
) -> None:
    entry = load_catalog(Path("/nowhere")).get(TRUE_SHAPE)
    release()
    torch.cuda.reset_peak_memory_stats(device)
    two_steps(made_up(entry, device), entry, rows=rows, tokens=tokens, rank=32)
    peak = torch.cuda.max_memory_reserved(device) + CONTEXT
    spec = spec_of(entry, "sft", max_length=tokens, batch_size=rows, lora_rank=32)
    needed = memory_needed(spec, entry, "gpu", rows * tokens)
    release()
    assert needed.total == pytest.approx(peak, rel=0.15), needed.parts


@contextmanager
def short_of_memory(base: BaseModel, room: int) -> Iterator[None]:
    """On CUDA `room` bytes beyond what is there, held to by torch's allocator; else so many tokens at once."""
    if base.device.type != "cuda":
        with room_for(base, training=5000):
            yield
        return
    release()
    whole = torch.cuda.get_device_properties(base.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(base.device) + room) / whole, base.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, base.device)


def test_a_run_short_of_memory_goes_on_with_less_at_a_time(
    load: Callable[..., BaseModel], train: Run, tmp_path: Path
) -> None:
    for folder in ("model", "rows"):
        (tmp_path / folder).mkdir()
    base = load(save_tiny(tmp_path / "model"), name="flash/nano")
    lines = [json.dumps({"input": f"{i} " + "x" * 400, "output": str(i)}) for i in range(96)]
    package = write_package(tmp_path / "rows" / "package", lines=lines)
    spec = sft_spec(batch_size=32, max_length=500)
    _, whole = train(base, spec, name="whole", folder=package)
    with short_of_memory(base, 48 << 20):
        result, small = train(base, spec, name="small", folder=package)
    assert result.step == 3 and memory_warnings(small)
    norms = [steps(reporter)[0]["grad_norm"] for reporter in (whole, small)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
