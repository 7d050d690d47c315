"""Times and prices: deterministic, rising with the work, honest about what was assumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.catalog.layouts import spec_of

from flash.catalog.catalog import load_catalog
from flash.catalog.cost import Dataset, check_fit, estimate, plan
from flash.catalog.hardware import cpu_class, gpu_classes, gpu_like, laptop
from flash.errors import InvalidInput

SHIPPED = {entry.id: entry for entry in load_catalog(Path("/nowhere"))}
GPUS = [gpu.hardware for gpu in gpu_classes()]
CPU = cpu_class(memory=16 * 10**9, cores=2)


def of(model, algorithm="sft", hardware=GPUS[0], dataset=None, **train):
    return estimate(spec_of(SHIPPED[model], algorithm, **train), SHIPPED[model], hardware, dataset)


def test_steps_follow_rows_epochs_and_caps():
    rows = Dataset(rows=100, tokens=50)
    assert of("flash/nano", dataset=rows, batch_size=32, epochs=3).steps == 12
    assert of("flash/nano", dataset=rows, batch_size=32, epochs=3, max_steps=5).steps == 5
    assert of("flash/nano", dataset=rows, batch_size=32, epochs=3, max_examples=32).steps == 3
    assert of("flash/nano", "grpo", dataset=rows, steps=7).steps == 7


def test_what_is_not_known_is_said():
    assert any("1,000 rows" in line for line in of("flash/nano").assumptions)
    assert any("max_examples" in line for line in of("flash/nano", max_examples=64).assumptions)
    known = of("flash/nano", dataset=Dataset(rows=10, tokens=20)).assumptions
    assert not any("dataset" in line or "average" in line for line in known)


def test_a_download_is_not_in_the_time_and_said():
    assert "the model's 1.5 GB are on the machine already" in of("Qwen/Qwen3.5-0.8B").assumptions
    assert not any("on the machine" in line for line in of("flash/nano").assumptions)


def test_the_price_is_hours_times_the_rate_and_ones_own_machine_is_free():
    found = of("Qwen/Qwen3.5-0.8B", "grpo", GPUS[-1])
    assert found.usd == pytest.approx(found.wall_clock_s / 3600 * GPUS[-1].usd_per_hour)
    assert found.wall_clock_s == pytest.approx(found.start_s + found.steps * found.step_s + found.evaluation_s)
    assert of("flash/nano", hardware=CPU).usd == 0.0


@settings(max_examples=60)
@given(
    model=st.sampled_from(sorted(SHIPPED)),
    algorithm=st.sampled_from(["sft", "grpo"]),
    hardware=st.sampled_from([*GPUS, CPU]),
    rows=st.integers(1, 5000),
    length=st.integers(400, 8000),
    key=st.sampled_from(["batch_size", "lora_rank", "epochs", "group_size", "steps", "max_tokens"]),
)
def test_more_work_never_costs_less(model, algorithm, hardware, rows, length, key):
    base = {"max_length": length, "batch_size": 4, "lora_rank": 8}
    base |= {"epochs": 2} if algorithm == "sft" else {"group_size": 2, "steps": 3, "max_tokens": 50}
    if key not in base or (algorithm == "sft" and key == "batch_size"):
        return  # a larger batch means fewer steps over the same rows
    less = of(model, algorithm, hardware, Dataset(rows, 100), **base)
    more = of(model, algorithm, hardware, Dataset(rows, 100), **{**base, key: base[key] * 2})
    assert more.wall_clock_s >= less.wall_clock_s
    assert of(model, algorithm, hardware, Dataset(rows + 7, 100), **base).wall_clock_s >= less.wall_clock_s


def test_equal_inputs_give_equal_documents_of_plain_json():
    spec = spec_of(SHIPPED["Qwen/Qwen3.5-4B"], "grpo")
    first, others = plan(spec, SHIPPED["Qwen/Qwen3.5-4B"], GPUS)
    again, _ = plan(spec, SHIPPED["Qwen/Qwen3.5-4B"], GPUS)
    document = first.document()
    assert json.loads(json.dumps(document)) == document == again.document()
    assert {other.hardware.name for other in others} < {gpu.name for gpu in GPUS}
    assert [other.usd for other in others] == sorted(other.usd for other in others)
    assert sum(document["memory_parts"].values()) >= document["memory_bytes"]


def test_a_limit_leaves_slow_machines_room():
    """A base over twenty times what a CPU's steps are thought to take, and hours for a slow reward."""
    found = of("flash/nano", hardware=CPU, dataset=Dataset(4000, 60))
    assert found.limit_base_s > 20 * found.steps * found.step_s
    judged = of("flash/nano", "grpo", CPU, Dataset(4000, 60))
    assert judged.limit_base_s > 150 * 60 + 20 * judged.steps * judged.step_s


def test_check_fit_refuses_what_no_device_can_hold():
    entry = SHIPPED["Qwen/Qwen3.5-9B"]
    with pytest.raises(InvalidInput, match=r"the roomiest hardware, CPU \(4 cores\), has 16 GB"):
        check_fit(spec_of(entry, "sft"), entry, [laptop()])
    check_fit(spec_of(entry, "sft"), entry, [laptop(), gpu_like("NVIDIA H200", 150 * 10**9)])
    check_fit(spec_of(entry, "sft"), entry, [])  # nothing is known of the hardware: nothing is refused


def test_a_driver_s_names_are_recognised():
    for name, like in (
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM"), ("NVIDIA L40S", "L40S"), ("NVIDIA H200", "H200"),
    ):  # fmt: skip
        model = next(gpu for gpu in GPUS if gpu.name == like)
        found = gpu_like(name, 10**9)
        assert (found.name, found.flops, found.bandwidth, found.usd_per_hour) == (name, model.flops, model.bandwidth, 0)
    assert gpu_like("NVIDIA T4", 16 * 10**9).flops == min(gpu.flops for gpu in GPUS)
