"""Every layout through training: SFT, GRPO in one turn and several, thinking, exact resume, warm start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.layouts.checkpoints import Layout
from tests.layouts.proofs import proves
from tests.layouts.runs import Run, grpo_spec, sft_spec

from flash.errors import ModelError
from flash.inference.chat import ChatRenderer
from flash.inference.loading import BaseModel
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult


def steps(reporter: RecordingReporter) -> list[dict[str, float]]:
    return [data["values"] for data in reporter.of("metrics")]


def warnings(reporter: RecordingReporter) -> dict[str, str]:
    return {data["code"]: data["text"] for data in reporter.of("warning")}


def digests(result: TrainResult) -> dict[str, str]:
    """Of everything a checkpoint holds: adapter, optimizer, torch's generators, cursor, metrics.

    Python's own generator stays out: the environment in this very process draws from it, on threads.
    """
    folder = result.checkpoint
    assert folder is not None
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    state = json.loads(content["state/state.json"])
    del state["python_random"]
    content["state/state.json"] = json.dumps(state).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}


def base_weights(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


@proves("SFT")
def test_sft_learns_the_targets_and_leaves_the_base_alone(layout: Layout, base: BaseModel, train: Run) -> None:
    before = base_weights(base)
    result, reporter = train(sft_spec(base.name, epochs=8))
    values = steps(reporter)
    assert result.step == len(values) == 24
    assert values[-1]["loss"] < 0.7 * values[0]["loss"]
    assert not warnings(reporter)
    adapter = base.adapters["policy"]
    assert all(pair.B.abs().max() > 0 for pair in adapter.pairs.values())  # every adapted layer has learnt
    after = base.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@proves("GRPO")
def test_grpo_follows_the_reward_and_samples_what_it_trains(base: BaseModel, train: Run) -> None:
    _, reporter = train(grpo_spec(base.name, steps=6, group_size=8))
    values = steps(reporter)
    assert len(values) == 6
    assert all(value["mismatch_kl"] < 1e-6 for value in values)  # sampler and trainer are one policy
    assert values[0]["kl"] == pytest.approx(0, abs=1e-6) and values[-1]["kl"] > 1e-4
    assert any(value["grad_norm"] > 0 for value in values)


@proves("multi-turn")
def test_grpo_over_several_turns_trains_on_the_tokens_it_sampled(base: BaseModel, train: Run) -> None:
    _, reporter = train(grpo_spec(base.name, kl_penalty_coef=0.1), turns=2)
    values = steps(reporter)
    assert {value["turns"] for value in values} == {2.0}
    assert all(value["mismatch_kl"] < 1e-6 for value in values)
    assert any(value["grad_norm"] > 0 for value in values)


@proves("multi-turn")
def test_what_follows_an_action_reads_as_the_template_writes_it(layout: Layout, base: BaseModel, train: Run) -> None:
    _, reporter = train(grpo_spec(base.name, steps=1), turns=2)
    text = reporter.of("sample")[0]["sample"]["text"]
    assert "<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n" in text
    assert "<s>" not in text  # a template's opening token is not repeated between turns


@proves("thinking")
def test_thinking_is_trained_and_told_from_the_answer(layout: Layout, base: BaseModel, train: Run) -> None:
    result, reporter = train(sft_spec(base.name, thinking=True, epochs=4), traces=True)
    assert result.step == 12 and not warnings(reporter)
    example = reporter.of("log")[0]["text"]
    assert "<|im_start|>assistant\n<think>\n⟦count\n</think>\n\n0<|im_end|>" in example
    renderer = ChatRenderer(base.tokenizer, thinking=True)
    assert renderer.opens_thinking
    assert renderer.split_thinking("count\n</think>\n\n0") == ("count", "0")

    _, reporter = train(
        grpo_spec(base.name, thinking=True, steps=2, thinking_length_penalty_coef=0.5), name="grpo"
    )  # fmt: skip
    values = steps(reporter)
    assert all(value["mismatch_kl"] < 1e-6 for value in values)
    assert values[0]["reward"] <= 0  # a trace that never closes has no answer, and costs its length


@proves("thinking")
def test_targets_without_a_trace_warn_when_thinking(base: BaseModel, train: Run) -> None:
    _, reporter = train(sft_spec(base.name, thinking=True, max_steps=1))
    assert "targets_without_thinking" in warnings(reporter)


@proves("resume")
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_resumed_run_is_byte_for_byte_the_uninterrupted_one(algorithm: str, base: BaseModel, train: Run) -> None:
    spec = sft_spec(base.name, max_steps=4) if algorithm == "sft" else grpo_spec(base.name)
    whole, _ = train(spec, name="whole")
    part, _ = train(spec, name="part", reporter=RecordingReporter(stop_at=2))
    assert part.stopped and part.step == 2
    rest, _ = train(spec, name="rest", resume_from=part.checkpoint)
    assert rest.step == whole.step
    assert digests(rest) == digests(whole)


@proves("warm start")
def test_a_warm_start_takes_the_weights(base: BaseModel, train: Run) -> None:
    source, before = train(sft_spec(base.name, epochs=8), name="source")
    assert source.checkpoint is not None
    init_from = source.checkpoint / "adapter"
    _, after = train(sft_spec(base.name, max_steps=1), name="warm", init_from=init_from)
    assert steps(after)[0]["loss"] < 0.8 * steps(before)[0]["loss"]
    _, reporter = train(grpo_spec(base.name, steps=1), name="grpo", init_from=init_from)
    assert steps(reporter)[0]["mismatch_kl"] < 1e-6 and steps(reporter)[0]["kl"] > 1e-4
    with pytest.raises(ModelError, match="rank"):
        train(sft_spec(base.name, lora_rank=4), name="other", init_from=init_from)


def test_an_adapter_of_one_layout_does_not_fit_another(
    layout: Layout, base: BaseModel, train: Run, checkpoints: dict[str, Path]
) -> None:
    from flash.inference.loading import load_base

    result, _ = train(sft_spec(base.name, max_steps=1))
    assert result.checkpoint is not None
    for name, folder in checkpoints.items():
        if name != layout.name:
            with pytest.raises(ModelError, match=r"another base model|does not fit"):
                load_base(folder, device="cpu").adapters.load("a", result.checkpoint / "adapter")


def test_flash_json_names_the_catalogs_model(layout: Layout, base: BaseModel, train: Run) -> None:
    result, _ = train(sft_spec(base.name, max_steps=1))
    assert result.checkpoint is not None
    document: dict[str, Any] = json.loads((result.checkpoint / "adapter" / "flash.json").read_text())
    assert document["base_model"] == layout.models[-1]
