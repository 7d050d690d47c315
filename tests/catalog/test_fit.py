"""Memory estimates against what models of each layout really have and keep, and refusals that help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalog.layouts import config_of, entry_of, spec_of

from flash.catalog.catalog import ModelEntry, load_catalog
from flash.catalog.fit import choose, fits, fitted, memory_needed
from flash.catalog.hardware import cpu_class, gpu_classes, gpu_like
from flash.catalog.shapes import (
    LAYOUTS,
    adapter_parameters,
    body_parameters,
    kept_bytes,
    parameter_count,
    working_adapter_parameters,
)
from flash.errors import InvalidInput, ModelError

SHIPPED = {entry.id: entry for entry in load_catalog(Path("/nowhere"))}
GPUS = [gpu.hardware for gpu in gpu_classes()]


# --- what the sizes imply -----------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", SHIPPED.values(), ids=lambda entry: entry.id)
def test_every_shipped_shape_adds_up_to_its_parameter_count(entry):
    assert parameter_count(entry) == entry.params


# Computed on models of these shapes with PEFT's `all-linear` (text model, rank 16).
@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("Qwen/Qwen3.5-0.8B", 10.8),
        ("Qwen/Qwen3.5-2B", 16.8),
        ("Qwen/Qwen3.5-4B", 32.5),
        ("Qwen/Qwen3.5-9B", 43.3),
        ("openbmb/MiniCPM5-1B", 11.206656),
        ("Qwen/Qwen3.6-35B-A3B", 22.5 + 922.7 / 8),  # routed experts: an eighth of the rank, as 8 of them work
    ],
)
def test_adapters_have_the_published_size(model, millions):
    assert adapter_parameters(SHIPPED[model], 16) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_those_of_the_real_classes(layout):
    import torch
    from transformers import AutoModelForCausalLM

    from flash.inference.lora import Adapters

    entry = entry_of(layout, tied=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(entry))
    assert parameter_count(entry) == sum(weight.numel() for weight in model.parameters())
    adapter = Adapters(model.to_empty(device="cpu")).create("a", rank=4, alpha=4, seed=0)
    assert adapter_parameters(entry, 4) == sum(weight.numel() for weight in adapter.parameters())


def test_a_mixture_works_with_its_active_experts_only():
    entry = SHIPPED["Qwen/Qwen3.6-35B-A3B"]
    assert 2.3e9 < body_parameters(entry) < 3e9
    dense, routed = 22.5e6 * 2, 922.7e6 * 2 / 8  # at rank 32
    assert working_adapter_parameters(entry, 32) == pytest.approx(dense + routed * 8 / 256, rel=0.01)
    plain = SHIPPED["Qwen/Qwen3.5-4B"]
    assert working_adapter_parameters(plain, 32) == adapter_parameters(plain, 32)


@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_keeps_the_bytes_that_autograd_really_saves(layout, width):
    import torch
    from transformers import AutoModelForCausalLM

    from flash.inference.lora import Adapters

    torch.set_num_threads(1)
    entry, tokens, rank = entry_of(layout), 256, 8
    dtype = torch.float32 if width == 4 else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config_of(entry), dtype=dtype, attn_implementation="sdpa").eval()
    adapters = Adapters(model)
    adapter = adapters.create("a", rank=rank, alpha=8, seed=0)
    own = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *adapter.parameters()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with adapters.active("a"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(3, 3 + tokens)[None] % 512, use_cache=False)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    casts = width * adapter_parameters(entry, rank, width=width) if width == 2 else 0
    assert kept_bytes(entry, rank=rank, width=width) * tokens + casts == pytest.approx(saved, rel=0.03)


# --- the sum ----------------------------------------------------------------------------------------------

SIZES = ("max_length", "batch_size", "lora_rank")


@settings(max_examples=60)
@given(
    model=st.sampled_from(sorted(SHIPPED)),
    algorithm=st.sampled_from(["sft", "grpo"]),
    kind=st.sampled_from(["gpu", "cpu"]),
    base=st.fixed_dictionaries(
        {
            "max_length": st.integers(400, 70_000),
            "batch_size": st.integers(1, 600),
            "lora_rank": st.integers(1, 64),
        }
    ),
    key=st.sampled_from([*SIZES, "group_size"]),
    more=st.integers(1, 50_000),
)
def test_need_never_falls_as_a_size_rises(model, algorithm, kind, base, key, more):
    entry = SHIPPED[model]
    if algorithm == "grpo":
        base = {**base, "group_size": 4, "max_tokens": 320}
    elif key == "group_size":
        key = "batch_size"
    larger = {**base, key: min(base[key] + more, 64 if key == "lora_rank" else 10**9)}
    before = memory_needed(spec_of(entry, algorithm, **base), entry, kind)
    after = memory_needed(spec_of(entry, algorithm, **larger), entry, kind)
    assert after.total >= before.total


def test_parts_add_up_and_the_larger_phase_counts():
    entry = SHIPPED["Qwen/Qwen3.5-4B"]
    found = memory_needed(spec_of(entry, "grpo"), entry)
    parts = dict(found.parts)
    training = parts.pop("activations") + parts.pop("head")
    assert found.total == max(training, parts.pop("rollouts")) + sum(parts.values())
    assert found.weights == 2 * entry.params
    assert memory_needed(spec_of(entry, "grpo"), entry, "cpu").weights == 4 * entry.params
    assert memory_needed(spec_of(entry, "sft"), entry).rollouts == 0


def test_micro_batches_shrink_to_fit_and_no_further():
    entry = SHIPPED["Qwen/Qwen3.5-0.8B"]
    spec = spec_of(entry, "sft", max_length=1024)
    small = fitted(spec, entry, cpu_class(memory=24 * 2**30, cores=2))
    assert small.total <= 0.8 * 24 * 2**30
    assert 1024 <= small.micro_batch_tokens < 16_384
    roomy = fitted(spec, entry, gpu_like("NVIDIA H200", 150 * 10**9))
    assert roomy.micro_batch_tokens == 16_384


# --- refusals ---------------------------------------------------------------------------------------------


def test_the_cheapest_class_that_fits_is_chosen():
    entry = SHIPPED["Qwen/Qwen3.5-9B"]
    spec = spec_of(entry, "grpo")
    chosen = choose(spec, entry, GPUS)
    assert fits(spec, entry, chosen)
    assert all(not fits(spec, entry, other) for other in GPUS if other.usd_per_hour < chosen.usd_per_hour)


def test_a_mixture_at_32k_tokens_fits_no_class_of_today():
    entry = SHIPPED["Qwen/Qwen3.6-35B-A3B"]
    with pytest.raises(InvalidInput) as caught:
        choose(spec_of(entry, "grpo", max_length=32_768), entry, GPUS)
    assert re.search(r"train\.max_length = 32768: .* needs \d+ GB of memory, .* B200, has 180 GB", caught.value.message)
    assert "lower train.max_length to" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("model", "algorithm", "train", "memory"),
    [
        ("Qwen/Qwen3.6-35B-A3B", "grpo", {"max_length": 32_768}, 180e9),
        ("Qwen/Qwen3.5-0.8B", "sft", {"max_length": 60_000}, 24e9),
        ("openbmb/MiniCPM5-1B", "grpo", {"max_length": 2048, "max_tokens": 2000, "group_size": 200}, 9e9),
    ],
)
def test_the_named_key_lowered_to_the_named_value_fits_and_one_more_does_not(model, algorithm, train, memory):
    entry = SHIPPED[model]
    hardware = gpu_like("some GPU", int(memory))
    with pytest.raises(InvalidInput) as caught:
        choose(spec_of(entry, algorithm, **train), entry, [hardware])
    named = re.fullmatch(r"lower train\.(\w+) to (\d+) or less", caught.value.remedy or "")
    assert named, caught.value
    key, value = named[1], int(named[2])
    assert fits(spec_of(entry, algorithm, **{**train, key: value}), entry, hardware)
    assert not fits(spec_of(entry, algorithm, **{**train, key: value + 1}), entry, hardware)


def test_weights_that_fit_nowhere_ask_for_another_model():
    entry = SHIPPED["Qwen/Qwen3.6-35B-A3B"]
    with pytest.raises(InvalidInput, match=r"choose a smaller model: the weights .* alone take 139 GB"):
        choose(spec_of(entry, "sft"), entry, [cpu_class(memory=16 * 10**9, cores=4)])


def test_a_model_without_a_shape_can_not_be_estimated():
    entry = ModelEntry(id="own/model", params=10**9, layout="qwen3", context=4096)
    with pytest.raises(ModelError, match=r"give its shape in models\.toml"):
        memory_needed(spec_of(entry, "sft"), entry)


# --- measured ---------------------------------------------------------------------------------------------

# Large enough that the interpreter's own memory does not hide an error: 0.6 to 3 GB in all.
MEASURED = {
    "qwen3_5": (512, {"hidden": 768, "ffn": 2048, "layers": 8, "head_dim": 256, "vocab": 100_000,
                      "linear": {"key_heads": 8, "value_heads": 8, "head_dim": 128, "conv": 4}}),
    "qwen3_5_moe": (512, {"hidden": 512, "ffn": 512, "layers": 8, "head_dim": 128, "vocab": 100_000,
                          "linear": {"key_heads": 4, "value_heads": 8, "head_dim": 128, "conv": 4}}),
    "qwen3": (1024, {"hidden": 768, "ffn": 2048, "layers": 8, "heads": 8, "head_dim": 128, "vocab": 100_000}),
    "llama": (1024, {"hidden": 768, "ffn": 2048, "layers": 8, "heads": 8, "head_dim": 128, "vocab": 100_000}),
}  # fmt: skip


def one_step(entry: ModelEntry, *, tokens: int, rank: int, timeout: float) -> dict[str, Any]:
    """Peak, what of it was there before the step, and the estimate, in bytes, of one step in a process of its own."""
    script = str(Path(__file__).with_name("one_step.py"))
    command = [sys.executable, script, entry.model_dump_json(), str(tokens), str(rank)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", MEASURED)
def test_the_peak_of_one_step_is_within_15_percent_of_the_estimate(layout):
    tokens, sizes = MEASURED[layout]
    found = one_step(entry_of(layout, **sizes), tokens=tokens, rank=16, timeout=600)
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15), found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_the_true_smallest_qwen_fits_a_laptop_as_estimated():
    """Random weights of the real shape, one row of the recipe's max_length, the recipe's rank: 0.75 B in fp32."""
    found = one_step(SHIPPED["Qwen/Qwen3.5-0.8B"], tokens=1024, rank=32, timeout=1800)
    assert found["peak"] < 24 * 2**30
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15), found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_over_a_large_vocabulary_holds_a_slice_of_its_logits():
    """4,096 tokens over 248,320 entries are 4.1 GB of fp32 logits, and as much again for their gradient."""
    entry = entry_of("qwen3_5", vocab=248_320, hidden=256, layers=1, full_layers=1)
    found = one_step(entry, tokens=4096, rank=8, timeout=900)
    assert found["peak"] - found["before"] < 0.15 * 4 * 4096 * 248_320, found  # body and optimizer included
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15), found
