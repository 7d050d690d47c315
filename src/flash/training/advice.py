"""When a GRPO run shows a known sickness, a sentence that says so and what to do. Numbers in, words out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

PATIENCE = 5  # steps running before a sickness is called one
MOSTLY_TRUNCATED = 0.5  # share of completions that hit max_tokens
FAR_FROM_BASE = 5.0  # k3 estimate, nats a token


@dataclass(frozen=True)
class StepFacts:
    lowest_reward: float
    highest_reward: float
    truncated: float  # share of the completions
    kl: float
    max_tokens: int


@dataclass
class Advisor:
    """Counts what it sees from step to step, and speaks once of each sickness. JSON-ready, for checkpoints."""

    running: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def observe(self, facts: StepFacts) -> Iterator[tuple[str, str]]:
        """(code, text) of each warning that this step brings."""
        for code, present, text in _sicknesses(facts):
            self.running[code] = self.running.get(code, 0) + 1 if present else 0
            if self.running[code] >= PATIENCE and code not in self.said:
                self.said.append(code)
                yield code, text


def _sicknesses(facts: StepFacts) -> list[tuple[str, bool, str]]:
    low, high = facts.lowest_reward, facts.highest_reward
    steps = f"in each of the last {PATIENCE} steps"
    return [
        (
            "reward_flat_low",
            low == high and high < 1,
            f"every completion got the same reward ({high:g}) {steps}, so there is nothing to learn from: "
            "give partial credit, start with easier rows, raise train.group_size, or run SFT first and set "
            "train.init_from_adapter",
        ),
        (
            "reward_flat_high",
            low == high and high >= 1,
            f"every completion got the same reward ({high:g}) {steps}: the task is solved, or the reward too easy. "
            "Stop here, or use harder rows or a stricter reward",
        ),
        (
            "mostly_truncated",
            facts.truncated > MOSTLY_TRUNCATED,
            f"more than half of the completions hit the token limit {steps}: raise train.max_tokens "
            f"(now {facts.max_tokens}), ask for shorter answers, or end them with train.stop_sequences",
        ),
        (
            "kl_runaway",
            facts.kl > FAR_FROM_BASE,
            f"the policy is far from its base (KL {facts.kl:.1f} nats a token, above {FAR_FROM_BASE:g} {steps}): "
            "lower train.learning_rate, or hold it with train.kl_penalty_coef (0.01 to 0.1)",
        ),
    ]
