"""Draws, nuclei and stops: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash.inference.engine import Sampling
from flash.inference.sampling import Draws, Knobs, StopMatcher, choose, likeliest, score, stream_key, uniforms

CPU = torch.device("cpu")


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    keys = np.array([stream_key(seed, sample) for seed in range(40) for sample in range(5)], dtype=np.uint64)
    table = np.stack([uniforms(keys, np.full(len(keys), place, dtype=np.uint64)) for place in range(100)])
    assert table.min() >= 0 and table.max() < 1
    counts = np.histogram(table, bins=20)[0]
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 19 + 4 * 38**0.5  # chi-squared, 4 sigma
    correlation = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(correlation) < 0.03
    assert len(np.unique(table)) == table.size


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_a_key_depends_on_every_part_and_on_their_order(parts: list[int]) -> None:
    key = stream_key(*parts)
    assert key == stream_key(*parts) and 0 <= key < 2**64
    assert key != stream_key(*parts, 0)
    assert key != stream_key(*parts[:-1], parts[-1] + 1)
    assert stream_key(1, 2) != stream_key(2, 1)


def test_a_draw_never_falls_on_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(3, 1)
    edges = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    tokens, logprobs = choose(logits, Knobs.of([Sampling(1)] * 3, CPU), edges)
    assert tokens.tolist() == [1, 3, 3]
    assert torch.isfinite(logprobs).all()


def test_greedy_rows_among_drawn_ones_take_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    u = torch.full((2, 1), 0.999999, dtype=torch.float64)
    tokens, _ = choose(logits, Knobs.of([Sampling(1, temperature=0.0), Sampling(1, temperature=2.0)], CPU), u)
    assert tokens.tolist() == [1, 2]


@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=generator).repeat(64, 1)
    u = (torch.arange(64, dtype=torch.float64)[:, None] + 0.5) / 64
    tokens, _ = choose(logits, Knobs.of([Sampling(1, top_p=top_p)] * 64, CPU), u)
    probs, order = logits[0].softmax(-1).sort(descending=True)
    size = int((probs.cumsum(0) < top_p - 1e-6).sum()) + 1
    assert set(tokens.tolist()) <= set(order[:size].tolist())


@given(st.text(min_size=1, max_size=30), st.data())
def test_a_stop_is_found_at_the_token_that_completes_it_and_no_earlier(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    tokens = list(text.encode())
    matcher = StopMatcher([stop], decode)
    found = next((i for i in range(1, len(tokens) + 1) if matcher.completed(tokens[:i])), None)
    expected = next(i for i in range(1, len(tokens) + 1) if stop in decode(tokens[:i]))
    assert found == expected


@pytest.mark.parametrize(
    ("pieces", "stop", "at"),
    [
        (["a<", "/ans", "wer> more", "x"], "</answer>", 2),
        (["abc", "def"], "cd", 1),
        (["one", " two", " three"], " two", 1),
        (["x\n", "\n", "y"], "\n\n", 1),
        (["all of it"], "l o", 0),
    ],
)
def test_stops_may_begin_and_end_inside_tokens(pieces: list[str], stop: str, at: int) -> None:
    matcher = StopMatcher(["never", stop], lambda tokens: "".join(pieces[token] for token in tokens))
    assert [matcher.completed(list(range(i + 1))) for i in range(at + 1)] == [False] * at + [True]


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([1.0, 0.6]))
def test_banned_tokens_are_never_drawn_and_change_no_logprob(seed: int, temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 20, generator=generator)
    banned = torch.rand(6, 20, generator=generator) < 0.8
    banned[:, 3] = False
    rows = [(Sampling(1, temperature=temperature, top_p=top_p, seed=seed), seed + i, i) for i in range(6)]
    tokens, logprobs = Draws(rows, CPU).next(logits, banned)
    assert not banned.gather(1, tokens[:, None]).any()
    assert torch.equal(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    alone, _ = Draws(rows, CPU).next(logits.masked_fill(banned, float("-inf")))
    assert torch.equal(tokens, alone)


def test_draws_go_on_where_a_row_stands() -> None:
    logits = torch.zeros(1, 50)
    whole = Draws([(Sampling(9), 7, 0)], CPU)
    drawn = [whole.next(logits)[0].item() for _ in range(6)]
    later = Draws([(Sampling(9), 7, 4)], CPU)
    assert [later.next(logits)[0].item() for _ in range(2)] == drawn[4:]


def test_scores_name_the_likeliest_beside_each_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    logprobs = logits.log_softmax(-1)
    first, second = score(logits, [0, 0], 2)
    assert (first.token, first.logprob) == (0, logprobs[0, 0].item())
    assert first.top == ((1, logprobs[0, 1].item()), (2, logprobs[0, 2].item()))
    assert [token for token, _ in second.top] == [0, 2]
    assert score(logits[:0], [], 2) == [] and score(logits, [1, 1], 0)[1].top == ()
    assert len(likeliest(logits, 20)[0]) == 3
