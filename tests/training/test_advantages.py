"""Advantages and advice: pure numbers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.training.advantages import all_equal, group_advantages, less_thinking, spread
from flash.training.advice import PATIENCE, Advisor, StepFacts

rewards = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_rewards_distances(values: list[float]) -> None:
    advantages = group_advantages(values)
    scale = max(1.0, max(abs(value) for value in values))
    assert abs(sum(advantages)) <= 1e-9 * scale * len(values)
    for value, advantage in zip(values, advantages, strict=True):
        assert advantage - advantages[0] == pytest.approx(value - values[0], abs=1e-9 * scale)


@given(st.floats(-1e6, 1e6), st.integers(1, 20))
def test_equal_rewards_have_no_spread(value: float, count: int) -> None:
    assert all_equal([value] * count)
    assert spread([value] * count) == pytest.approx(0, abs=1e-9)
    assert not all_equal([value, value + 1])


def test_the_spread_does_not_scale_an_advantage() -> None:
    assert group_advantages([0.0, 0.0, 0.0, 1.0]) == [-0.25, -0.25, -0.25, 0.75]
    assert spread([0.0, 2.0]) == 1.0


def test_thinking_costs_in_proportion_to_the_budget() -> None:
    assert less_thinking(1.0, coefficient=0.5, thinking_tokens=30, max_tokens=60) == 0.75
    assert less_thinking(1.0, coefficient=0.0, thinking_tokens=60, max_tokens=60) == 1.0


HEALTHY = StepFacts(lowest_reward=0.0, highest_reward=1.0, truncated=0.1, kl=0.2, max_tokens=32)


@pytest.mark.parametrize(
    ("sick", "code"),
    [
        ({"lowest_reward": 0.0, "highest_reward": 0.0}, "reward_flat_low"),
        ({"lowest_reward": 1.0, "highest_reward": 1.0}, "reward_flat_high"),
        ({"truncated": 0.6}, "mostly_truncated"),
        ({"kl": 6.0}, "kl_runaway"),
    ],
)
def test_advice_comes_once_after_some_steps_running(sick: dict, code: str) -> None:
    facts = dataclasses.replace(HEALTHY, **sick)
    advisor = Advisor()
    assert [list(advisor.observe(facts)) for _ in range(PATIENCE - 1)] == [[]] * (PATIENCE - 1)
    assert list(advisor.observe(HEALTHY)) == []  # a good step starts the count anew
    said = [warning for _ in range(3 * PATIENCE) for warning in advisor.observe(facts)]
    assert [each for each, _ in said] == [code]
    again = Advisor(**json.loads(json.dumps(dataclasses.asdict(advisor))))  # as a resumed run would have it
    assert not [warning for _ in range(3 * PATIENCE) for warning in again.observe(facts)]
