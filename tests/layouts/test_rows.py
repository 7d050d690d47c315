"""Rows that share a batch never learn of each other, on any layout: in training, in its gradients, in decoding.

Qwen3.5's linear attention carries a state along a row; whatever crosses from one row into another through it would
be silent, so each way of putting rows together is held against the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.layouts.checkpoints import LAYOUTS, Layout
from tests.layouts.proofs import proves

from flash.errors import ModelError
from flash.inference.continuous import ContinuousEngine
from flash.inference.decoding import check_rows_stay_apart
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel, load_base
from flash.inference.torch_engine import TorchEngine
from flash.training.batches import collate
from flash.training.forward import model_forward
from flash.training.policy import Policy, build_policy, rows_stay_apart

rows_of_tokens = st.lists(
    st.lists(st.integers(3, 250), min_size=2, max_size=90), min_size=2, max_size=5
)  # fmt: skip
ROUNDING = 1e-4  # nats: what these random models' fp32 allows at worst; a leak is a hundred times that
# the policy is one for all examples on purpose: making it is what takes long
few = settings(
    max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip


@pytest.fixture(scope="session")
def policy_of(checkpoints: dict[str, Path]) -> Callable[[Layout], Policy]:
    @cache
    def build(name: str) -> Policy:
        base = load_base(checkpoints[name], name=LAYOUTS[name].models[-1], device="cpu")
        policy = build_policy(base, rank=4, alpha=8, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for pair in policy.adapter.pairs.values():
                pair.B.normal_(std=0.05, generator=generator)
        return policy

    return lambda layout: build(layout.name)


@pytest.fixture
def policy(layout: Layout, policy_of: Callable[[Layout], Policy]) -> Iterator[Policy]:
    policy = policy_of(layout)
    yield policy
    for weight in policy.parameters():
        weight.grad = None


def logprobs_and_gradients(policy: Policy, batches: list[list[list[int]]], opening: int = 0) -> list[torch.Tensor]:
    """All tokens' log-probabilities, and the gradient of their weighted sum; one micro-batch for each of `batches`."""
    for weight in policy.parameters():
        weight.grad = None
    found = []
    for rows in batches:
        masks = [[True] * len(row) for row in rows]
        openings = [(0, opening)] * len(rows) if opening else None
        batch = collate(rows, masks, pad_id=policy.base.pad_id, device=policy.base.device, openings=openings)
        logprobs_N = policy.logprobs(batch)
        (logprobs_N * logprobs_N.detach().cos()).sum().backward()
        found.append(logprobs_N.detach())
    return [torch.cat(found), *(weight.grad for weight in policy.parameters() if weight.grad is not None)]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Log-probabilities to 1e-5. Gradients, which these random models round more, to 1e-3 of their largest value:
    a leak moves either by a hundredth and more."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        bound = (1e-3 if number else 1e-5) * max(1.0, float(other.abs().max()))
        assert float((one - other).abs().max()) <= bound, number


@proves("rows apart")
@few
@given(rows=rows_of_tokens)
def test_rows_padded_into_one_batch_are_the_rows_alone(policy: Policy, rows: list[list[int]]) -> None:
    together = logprobs_and_gradients(policy, [rows])
    alone = logprobs_and_gradients(policy, [[row] for row in rows])
    assert_close(together, alone)


@proves("rows apart")
@few
@given(opening=st.lists(st.integers(3, 250), min_size=1, max_size=70), rows=rows_of_tokens)
def test_rows_that_share_an_opening_are_the_rows_alone(
    policy: Policy, opening: list[int], rows: list[list[int]]
) -> None:
    whole = [opening + row for row in rows]
    together = logprobs_and_gradients(policy, [whole], opening=len(opening))
    alone = logprobs_and_gradients(policy, [[row] for row in whole])
    assert_close(together, alone)


@proves("rows apart")
@few
@given(prompts=rows_of_tokens, tokens=st.integers(1, 12))
def test_rows_decoded_together_are_the_rows_alone(policy: Policy, prompts: list[list[int]], tokens: int) -> None:
    engine = TorchEngine(policy.base, ignore_stop_ids=True)
    sampling = Sampling(max_tokens=tokens, temperature=1.0, seed=5)
    requests = [Request(tuple(prompt), sampling, adapter=policy.name) for prompt in prompts]
    together = [completions[0] for completions in engine.generate(requests)]
    for request, completion in zip(requests, together, strict=True):
        alone = engine.generate([request])[0][0]
        assert completion.tokens == alone.tokens
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=ROUNDING)


@proves("rows apart")
@few
@given(prompts=rows_of_tokens, most=st.integers(1, 3))
def test_rows_that_come_and_go_do_not_touch_the_others(policy: Policy, prompts: list[list[int]], most: int) -> None:
    """Samples of different length leave the batch at different times, and waiting ones take their place."""
    engine = TorchEngine(policy.base, ignore_stop_ids=True, max_rows=most)
    requests = [
        Request(tuple(prompt), Sampling(max_tokens=1 + 3 * number, seed=number), n=2, adapter=policy.name)
        for number, prompt in enumerate(prompts)
    ]
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        for completion, alone in zip(completions, engine.generate([request])[0], strict=True):
            assert completion.tokens == alone.tokens
            assert completion.logprobs == pytest.approx(alone.logprobs, abs=ROUNDING)


@proves("rows apart")
@few
@given(prompt=st.lists(st.integers(3, 250), min_size=2, max_size=70))
def test_the_sampler_is_the_trainer(policy: Policy, prompt: list[int]) -> None:
    engine = TorchEngine(policy.base, ignore_stop_ids=True)
    request = Request(tuple(prompt), Sampling(max_tokens=10, seed=3), n=3, adapter=policy.name)
    for completion in engine.generate([request])[0]:
        row = [*prompt, *completion.tokens]
        masks = [[False] * len(prompt) + [True] * len(completion.tokens)]
        batch = collate([row], masks, pad_id=policy.base.pad_id, device=policy.base.device)
        with torch.no_grad():
            trained = policy.logprobs(batch).tolist()
            bare = policy.logprobs(batch, reference=True).tolist()
        assert completion.logprobs == pytest.approx(trained, abs=ROUNDING)
        assert completion.logprobs != pytest.approx(bare, abs=1e-3)


# --- the check at load ----------------------------------------------------------------------------------------


class Mixing(torch.nn.Module):
    """A layer's norm that also lets in the mean of everything along one dimension."""

    def __init__(self, norm: torch.nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.dim = norm, dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + 0.1 * x.mean(dim=self.dim, keepdim=True)


def mixed(checkpoints: dict[str, Path], name: str, dim: int) -> BaseModel:
    base = load_base(checkpoints[name], name=name, device="cpu")
    layer = base.model.model.layers[1]
    layer.input_layernorm = Mixing(layer.input_layernorm, dim)
    return base


@pytest.mark.parametrize("name", ["Qwen3.5", "Qwen3.6 MoE"])
def test_a_layout_whose_rows_mix_is_trained_row_by_row(
    name: str, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = mixed(checkpoints, name, dim=0)
    assert not rows_stay_apart(base, model_forward(base))
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    assert "rows of one batch affect each other" in caplog.text
    rows = [list(range(3, 40)), list(range(50, 60))]
    assert_close(
        logprobs_and_gradients(policy, [rows]), logprobs_and_gradients(policy, [[row] for row in rows])
    )  # fmt: skip


def test_a_model_that_sees_the_tokens_to_come_is_refused(checkpoints: dict[str, Path]) -> None:
    base = mixed(checkpoints, "Qwen3.5", dim=1)
    with pytest.raises(ModelError, match="depends on the tokens after it"):
        build_policy(base, rank=4, alpha=8, seed=0)


def test_a_model_whose_rows_mix_in_decoding_is_refused(checkpoints: dict[str, Path]) -> None:
    base = mixed(checkpoints, "Qwen3.5", dim=0)
    with pytest.raises(ModelError, match="decoded together affect each other"):
        ContinuousEngine(base)
    with pytest.raises(ModelError, match="decoded together affect each other"):
        TorchEngine(base).generate([Request((5, 6, 7), Sampling(max_tokens=1))])


@pytest.mark.parametrize("name", ["Qwen3.5", "Qwen3.6 MoE"])
def test_the_checks_pass_in_bf16_too(name: str, checkpoints: dict[str, Path]) -> None:
    base = load_base(checkpoints[name], device="cpu", dtype=torch.bfloat16)
    assert rows_stay_apart(base, model_forward(base))
    check_rows_stay_apart(base.model)
