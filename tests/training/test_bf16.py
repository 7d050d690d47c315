"""A bf16 base, as on a GPU, with everything that adds up in fp32: adapters, log-probabilities, losses, moments.

The same arithmetic runs here on a processor, slowly; what only a GPU can show is in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_grpo import grpo_spec, package

from flash.config.run import RunSpec
from flash.environments.loading import LocalEnvironment
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel, load_base
from flash.inference.torch_engine import TorchEngine
from flash.training import grpo, sft
from flash.training.batches import collate
from flash.training.losses import token_logprobs
from flash.training.optimizer import build_optimizer
from flash.training.policy import build_policy
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult

MISMATCH = 2e-3  # nats a token between sampler and trainer, which round in different places; a wrong policy: > 0.1


@pytest.fixture
def narrow(tiny_folder: Path) -> BaseModel:
    return load_base(tiny_folder, name="flash/nano", device="cpu", dtype=torch.bfloat16)


@pytest.fixture
def run(
    narrow: BaseModel, environment: LocalEnvironment, tmp_path: Path
) -> Iterator[Callable[..., tuple[TrainResult, list[dict[str, float]]]]]:
    opened = []

    def start(spec: RunSpec, name: str, *, stop_at: int | None = None, **options: object) -> tuple:
        folder, reporter = tmp_path / name, RecordingReporter(stop_at=stop_at)
        folder.mkdir()
        if spec.algorithm == "sft":
            result = sft.train(spec, narrow, environment, reporter, work_dir=folder, **options)
        else:
            opened.append(LocalEnvironment(package(folder / "package"), {}, folder))
            result = grpo.train(spec, narrow, opened[-1], reporter, work_dir=folder, **options)
        return result, [data["values"] for data in reporter.of("metrics")]

    yield start
    for each in opened:
        each.close()


def test_sft_learns_and_leaves_the_base_as_it_was(run, spec, narrow) -> None:
    before = {name: value.clone() for name, value in narrow.model.state_dict().items()}
    result, values = run(spec(epochs=8, save_every=1000), "work")
    assert result.step == 48 and values[-1]["loss"] < 0.6 * values[0]["loss"]
    after = narrow.model.state_dict()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_bf16_learns_what_fp32_learns(run, spec, base, environment, tmp_path) -> None:
    _, narrow = run(spec(epochs=4), "bf16")
    reporter = RecordingReporter()
    (tmp_path / "fp32").mkdir()
    sft.train(spec(epochs=4), base, environment, reporter, work_dir=tmp_path / "fp32")
    wide = [data["values"] for data in reporter.of("metrics")]
    assert all(
        ours["loss"] == pytest.approx(theirs["loss"], rel=0.05) for ours, theirs in zip(narrow, wide, strict=True)
    )


def test_grpo_learns_and_its_sampler_is_its_trainer_to_rounding(run) -> None:
    _, values = run(grpo_spec(steps=25, group_size=8, batch_size=4), "work")
    first, last = (sum(value["reward"] for value in part) / 5 for part in (values[:5], values[-5:]))
    assert last > first + 0.1
    assert 0 < max(value["mismatch_kl"] for value in values) < MISMATCH


def test_what_is_trained_and_kept_is_fp32(run, spec, narrow) -> None:
    result, _ = run(spec(max_steps=2), "work")
    folder = result.checkpoint
    for name in ("adapter/adapter_model.safetensors", "state/optimizer.safetensors"):
        assert {tensor.dtype for tensor in load_file(folder / name).values()} == {torch.float32}
    policy = build_policy(narrow, rank=4, alpha=8, seed=0)
    batch = collate([[5, 6, 7, 8]], [[True] * 4], pad_id=0, device=narrow.device)
    logprobs = policy.logprobs(batch)
    loss = logprobs.sum()
    loss.backward()
    assert {logprobs.dtype, loss.dtype, *(weight.grad.dtype for weight in policy.parameters())} == {torch.float32}
    optimizer = build_optimizer(policy.parameters(), spec().recipe, learning_rate=1e-3)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert {tensor.dtype for tensor in moments} == {torch.float32}


def test_small_updates_are_not_lost(run, spec, narrow) -> None:
    """In bf16 a step of 1e-6 on a weight of 0.1 would round to nothing."""
    result, _ = run(spec(max_steps=1, learning_rate=1e-6), "work")
    fresh = build_policy(narrow, rank=4, alpha=8, seed=0).adapter.tensors()
    after = load_file(result.checkpoint / "adapter" / "adapter_model.safetensors")
    moved = [(after[name] - fresh[name]).abs() for name in after if "lora_B" in name]
    assert all(0 < float(each.max()) < 2e-6 for each in moved)


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(algorithm: str, run, spec) -> None:
    settings = spec(epochs=1) if algorithm == "sft" else grpo_spec()
    whole, _ = run(settings, "whole")
    part, _ = run(settings, "part", stop_at=2)
    torch.manual_seed(99)
    rest, _ = run(settings, "rest", resume_from=part.checkpoint)
    for name in ("adapter/adapter_model.safetensors", "state/optimizer.safetensors"):
        assert (rest.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()


def test_the_adapter_loads_in_peft_and_gives_the_logits_that_were_trained(run, spec, narrow, tiny_folder) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result, _ = run(spec(epochs=4), "work")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    peft = PeftModel.from_pretrained(model, result.checkpoint / "adapter").eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad(), narrow.adapters.active(None):
        bare = narrow.model(tokens).logits.float()
    with torch.no_grad(), narrow.adapters.active("policy"):
        ours = narrow.model(tokens).logits.float()
    with torch.no_grad():
        theirs = peft(tokens).logits.float()
    assert (ours - theirs).norm() < 0.02 * ours.norm() < 0.2 * (ours - bare).norm()


def test_the_chunked_head_in_bf16_has_the_gradient_of_the_full_head_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 64, generator=generator).bfloat16()
    head = (torch.randn(1000, 64, generator=generator) / 8).bfloat16()
    targets = torch.randint(0, 1000, (300,), generator=generator)
    wide = states.float().requires_grad_()
    plain = (wide @ head.float().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    plain.sum().backward()
    for chunk in (1, 7, 300):
        low = states.clone().requires_grad_()
        ours = token_logprobs(low, head, targets, chunk=chunk)
        ours.sum().backward()
        assert (ours - plain).abs().max() < 0.02
        assert (low.grad.float() - wide.grad).norm() < 0.01 * wide.grad.norm()


def test_sampled_log_probabilities_are_the_trainers(narrow: BaseModel) -> None:
    policy = build_policy(narrow, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.05)
    engine = TorchEngine(narrow, ignore_stop_ids=True)
    request = Request(tuple(range(5, 25)), Sampling(max_tokens=40, seed=3), n=4, adapter=policy.name)
    for completion in engine.generate([request])[0]:
        row = [*request.prompt, *completion.tokens]
        batch = collate([row], [[False] * 20 + [True] * 40], pad_id=0, device=narrow.device)
        with torch.no_grad():
            trained = policy.logprobs(batch)
        assert (torch.tensor(completion.logprobs) - trained).abs().mean() < 0.02


def test_micro_batches_change_the_gradient_by_rounding_only(narrow: BaseModel) -> None:
    policy = build_policy(narrow, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.05)
    rows = [list(range(3, 20)), list(range(30, 41)), list(range(50, 90))]

    def gradient(batches: list[list[list[int]]]) -> torch.Tensor:
        for weight in policy.parameters():
            weight.grad = None
        for batch in batches:
            masks = [[True] * len(row) for row in batch]
            policy.logprobs(collate(batch, masks, pad_id=0, device=narrow.device)).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in policy.parameters()])

    with narrow.adapters.active(policy.name):
        together, apart = gradient([rows]), gradient([[row] for row in rows])
    assert (together - apart).norm() < 0.02 * together.norm()
