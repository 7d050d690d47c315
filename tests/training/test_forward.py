"""The lean forward against the model's own: hidden states and adapter gradients, for every layout it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flash.inference.loading import BaseModel
from flash.inference.lora import Adapters, save_adapter
from flash.training.batches import collate
from flash.training.forward import lean_forward, model_forward
from flash.training.policy import Policy, build_policy

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    "qwen3 with biases": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, attention_bias=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)),
    "llama with scaled rope": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE)),
}


def based_on(base: BaseModel, model: torch.nn.Module) -> BaseModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                weight.normal_(mean=1.0, std=0.3)
    return dataclasses.replace(base, model=model.eval(), adapters=Adapters(model))


def gradients(policy: Policy) -> list[torch.Tensor]:
    batch = collate(
        [list(range(3, 20)), list(range(30, 41))],
        [[place % 3 == 0 for place in range(17)], [place > 4 for place in range(11)]],
        pad_id=0,
        device=policy.base.device,
    )
    logprobs = policy.logprobs(batch)
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    found = [weight.grad for weight in policy.parameters()]
    for weight in policy.parameters():
        weight.grad = None
    return [logprobs.detach(), *found]


@pytest.mark.parametrize("rank", [4, 24], ids=["narrow adapter", "wide adapter"])
@pytest.mark.parametrize("layout", MODELS)
def test_values_and_gradients_are_the_models_own(layout: str, rank: int, base: BaseModel) -> None:
    torch.manual_seed(0)
    base = based_on(base, MODELS[layout]())
    policy = build_policy(base, rank=rank, alpha=8, seed=0)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.1)
    lean = lean_forward(base)
    assert lean is not None and policy.forward.__class__ is lean.__class__
    ours = gradients(policy)
    theirs = gradients(dataclasses.replace(policy, forward=model_forward(base)))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert all(grad.abs().max() > 1e-4 for grad in ours[1:])


@pytest.mark.parametrize(
    ("opening", "own", "split"), [(9, (12, 3, 2, 9, 1), True), (9, (1, 1, 1, 1, 1), True), (2, (12, 3, 2, 9, 1), False)]
)
def test_openings_that_rows_share_change_the_work_and_nothing_else(
    opening: int, own: tuple[int, ...], split: bool, base: BaseModel
) -> None:
    torch.manual_seed(0)
    base = based_on(base, MODELS["qwen3"]())
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.1)
    first, second = list(range(3, 3 + opening)), list(range(40, 40 + opening // 2))
    rows = [
        opened + [7 + place for place in range(size)]
        for opened, size in zip([first, second, first, second, first], own, strict=True)
    ]
    starts = [opening, opening // 2, opening, opening // 2, opening]
    openings = [(owner, start) for owner, start in zip([0, 1, 0, 1, 0], starts, strict=True)]
    masks = [[place >= start for place in range(len(row))] for row, start in zip(rows, starts, strict=True)]

    def found(openings: list[tuple[int, int]] | None) -> list[torch.Tensor]:
        batch = collate(rows, masks, pad_id=0, device=base.device, openings=openings)
        assert openings is None or (batch.sharing is not None and (batch.sharing.split is not None) == split)
        logprobs = policy.logprobs(batch)
        (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
        gradients = [weight.grad for weight in policy.parameters()]
        for weight in policy.parameters():
            weight.grad = None
        return [logprobs.detach(), *gradients]

    for one, other in zip(found(openings), found(None), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_bare_base_and_the_base_stays_as_it_was(base: BaseModel) -> None:
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair.B.normal_(std=0.1)
    batch = collate([[5, 6, 7, 8]], [[False, True, True, True]], pad_id=0, device=base.device)
    own = dataclasses.replace(policy, forward=model_forward(base))
    reference = policy.logprobs(batch, reference=True)
    assert torch.allclose(reference, own.logprobs(batch, reference=True), atol=1e-5)
    assert (reference - policy.logprobs(batch)).abs().max() > 1e-3
    policy.logprobs(batch).sum().backward()
    assert all(torch.equal(value, weights[name]) for name, value in base.model.state_dict().items())


def test_an_adapter_that_leaves_layers_out_works(base: BaseModel, tmp_path: Path) -> None:
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    for path in list(policy.adapter.pairs):
        if path.endswith(("k_proj", "up_proj", "o_proj")):
            del policy.adapter.pairs[path]
        else:
            torch.nn.init.normal_(policy.adapter.pairs[path].B, std=0.1)
    save_adapter(policy.adapter, tmp_path, base_model="tiny")
    partial = build_policy(base, rank=4, alpha=8, seed=0, init_from=tmp_path)
    ours = gradients(partial)
    theirs = gradients(dataclasses.replace(partial, forward=model_forward(base)))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(ours, theirs, strict=True))


def test_what_it_does_not_know_keeps_its_own_forward(base: BaseModel) -> None:
    assert lean_forward(dataclasses.replace(base, dtype=torch.bfloat16)) is None
    window = Qwen3Config(**COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert lean_forward(based_on(base, Qwen3ForCausalLM(window))) is None

    class Doubled(torch.nn.Module):  # a layer that the lean forward would overlook
        def __init__(self, norm: torch.nn.Module) -> None:
            super().__init__()
            self.weight, self.variance_epsilon, self.norm = norm.weight, norm.variance_epsilon, norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.norm(x)

    model = Qwen3ForCausalLM(Qwen3Config(**COMMON))
    model.model.norm = Doubled(model.model.norm)
    assert lean_forward(based_on(base, model)) is None
