"""Training on the device: it learns, on every layout, resumes, repeats itself, and samples what it trains."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.gpu.conftest import Run, steps
from tests.layouts.runs import grpo_spec, sft_spec
from tests.training.test_out_of_memory import memory_warnings

from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.config.run import RunSpec
from flash.environments.loading import LocalEnvironment
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel
from flash.inference.torch_engine import TorchEngine
from flash.training.batches import collate
from flash.training.checkpoints import ADAPTER
from flash.training.evaluation import evaluate
from flash.training.policy import build_policy
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult
from flash.training.surrogate import k3

ARITHMETIC = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
MISMATCH = 5e-3  # nats a token that two bf16 passes may differ by; runs fail at 0.1
ALGORITHMS = {"sft": sft_spec, "grpo": grpo_spec}


def example(algorithm: str, **train: object) -> RunSpec:
    config, _ = parse_config(tomllib.loads((ARITHMETIC / f"{algorithm}.toml").read_text(encoding="utf-8")))
    spec = resolve(config, seed=0)
    return spec.model_copy(update={"train": spec.train.model_copy(update=train)})


def tensors(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    found: dict[str, torch.Tensor] = load_file(result.checkpoint / ADAPTER / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_flash_nano_learns_arithmetic_as_on_a_processor(
    algorithm: str, nano: BaseModel, train: Run, tmp_path: Path
) -> None:
    spec = example(algorithm, max_steps=60) if algorithm == "sft" else example(algorithm, steps=60)
    result, reporter = train(nano, spec, folder=ARITHMETIC)
    assert result.checkpoint is not None
    (tmp_path / "evaluation").mkdir()
    environment = LocalEnvironment(ARITHMETIC, {}, tmp_path / "evaluation")
    told = RecordingReporter()
    try:
        report = evaluate(
            spec, nano, TorchEngine(nano), environment, told, result.checkpoint / ADAPTER, step=result.step
        )
    finally:
        environment.close()
    assert report is not None, told.of("warning")
    assert report.adapter - report.base > LEARNT[algorithm], report
    if algorithm == "grpo":
        assert max(value["mismatch_kl"] for value in steps(reporter)) < MISMATCH


# Half of what 60 steps bring on a CPU.
LEARNT = {"sft": 0.2, "grpo": 0.2}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_layout_trains(algorithm: str, base: BaseModel, train: Run) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    spec = sft_spec(base.name, epochs=8) if algorithm == "sft" else grpo_spec(base.name, steps=6, group_size=8)
    result, reporter = train(base, spec)
    values = steps(reporter)
    assert len(values) == result.step and not memory_warnings(reporter)
    if algorithm == "sft":
        assert values[-1]["loss"] < 0.7 * values[0]["loss"]
    else:
        assert max(value["mismatch_kl"] for value in values) < MISMATCH
        assert any(value["grad_norm"] > 0 for value in values)
    assert {tensor.dtype for tensor in tensors(result).values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_seed_gives_one_adapter(algorithm: str, base: BaseModel, train: Run) -> None:
    spec = ALGORITHMS[algorithm](base.name)
    first, second = (tensors(train(base, spec, name=name)[0]) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_ends_with_the_adapter_of_an_uninterrupted_one(
    algorithm: str, base: BaseModel, train: Run
) -> None:
    spec = ALGORITHMS[algorithm](base.name)
    whole, _ = train(base, spec, name="whole")
    part, _ = train(base, spec, name="part", stop_at=2)
    assert part.step == 2 and part.stopped
    rest, _ = train(base, spec, name="rest", resume_from=part.checkpoint)
    ours, theirs = tensors(rest), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_sampler_is_the_trainer(base: BaseModel) -> None:
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.05)
    engine = TorchEngine(base, ignore_stop_ids=True)
    request = Request(tuple(range(5, 75)), Sampling(max_tokens=30, seed=3), n=8, adapter=policy.name)
    for completion in engine.generate([request])[0]:
        row = [*request.prompt, *completion.tokens]
        masks = [[False] * len(request.prompt) + [True] * len(completion.tokens)]
        batch = collate([row], masks, pad_id=base.pad_id, device=base.device)
        with torch.no_grad():
            trained = policy.logprobs(batch).cpu()
            bare = policy.logprobs(batch, reference=True).cpu()
        sampled = torch.tensor(completion.logprobs)
        assert float(k3(sampled, trained).mean()) < MISMATCH
        assert (sampled - trained).abs().mean() < 0.2 * (sampled - bare).abs().mean()
