"""The chunked head against the plain one, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.training.losses import negative_log_likelihood, token_logprobs


def case(seed: int, rows: int, hidden: int = 12, vocabulary: int = 37) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, hidden, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, hidden, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return states, head, targets, torch.randn(rows, generator=generator)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 20),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_any_chunking_equals_the_full_head(seed: int, rows: int, chunk: int, temperature: float) -> None:
    states, head, targets, weights = case(seed, rows)
    ours = token_logprobs(states, head, targets, temperature=temperature, chunk=chunk)
    (ours * weights).sum().backward()
    ours_gradient, states.grad = states.grad, None

    plain = ((states @ head.t()) / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (plain * weights).sum().backward()

    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.allclose(ours_gradient, states.grad, atol=1e-5)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows_N=st.lists(st.integers(0, 6), max_size=20),
    chunk=st.integers(1, 9),
    temperature=st.sampled_from([1.0, 1.7]),
)
def test_a_state_may_predict_any_number_of_targets(
    seed: int, rows_N: list[int], chunk: int, temperature: float
) -> None:
    states, head, _, _ = case(seed, 7)
    _, _, targets, weights = case(seed, len(rows_N))
    rows = torch.tensor(rows_N, dtype=torch.long)
    ours = token_logprobs(states, head, targets, rows, temperature=temperature, chunk=chunk)
    (ours * weights).sum().backward()
    ours_gradient, states.grad = states.grad, None

    repeated = token_logprobs(states[rows], head, targets, temperature=temperature)
    (repeated * weights).sum().backward()

    assert torch.allclose(ours, repeated, atol=1e-5)
    assert torch.allclose(ours_gradient, states.grad, atol=1e-5)


def test_bf16_hidden_states_keep_fp32_log_probabilities() -> None:
    states, head, targets, _ = case(2, 6)
    low = states.detach().to(torch.bfloat16).requires_grad_()
    result = token_logprobs(low, head.to(torch.bfloat16), targets)
    result.sum().backward()
    assert result.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert torch.allclose(result, token_logprobs(states, head, targets), atol=0.2)


def test_the_head_must_be_frozen() -> None:
    states, head, targets, _ = case(3, 2)
    with pytest.raises(ValueError, match="frozen"):
        token_logprobs(states, head.requires_grad_(), targets)


def test_no_rows_is_no_loss() -> None:
    states, head, targets, _ = case(4, 0)
    assert token_logprobs(states, head, targets).shape == (0,)


def test_parts_of_a_batch_add_up() -> None:
    logprobs = -torch.arange(1.0, 8.0)
    whole = negative_log_likelihood(logprobs, normaliser=7)
    parts = sum(negative_log_likelihood(part, normaliser=7) for part in logprobs.split([2, 4, 1]))
    assert torch.allclose(whole, torch.as_tensor(parts)) and whole.item() == pytest.approx(4.0)
