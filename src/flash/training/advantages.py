"""From rewards to advantages, group by group. Pure numbers; knows no tokens, models or environments."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward less its group's mean, not divided by the spread (Liu et al. 2025, "Dr. GRPO").

    Dividing by the standard deviation would weigh groups that are nearly always right or wrong more.
    """
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def all_equal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards carry no gradient: its advantages are all zero."""
    return all(reward == rewards[0] for reward in rewards)


def less_thinking(reward: float, *, coefficient: float, thinking_tokens: float, max_tokens: int) -> float:
    """The reward less `coefficient` for a trace that fills `max_tokens`, in proportion for a shorter one."""
    return reward - coefficient * thinking_tokens / max_tokens


def spread(rewards: Sequence[float]) -> float:
    """Population standard deviation."""
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
