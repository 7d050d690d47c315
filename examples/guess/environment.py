"""A guessing game over several turns: find a number from 1 to 20 by "higher" and "lower", in five guesses.

The game keeps no state of its own: what was guessed stands in the transcript. See README.md for the reward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from freesolo.contracts.types import ChatMessage
from freesolo.datasets import TaskExample
from freesolo.environments import (
    EnvironmentEpisode,
    EnvironmentMultiTurn,
    EnvironmentStepResult,
    RewardMetric,
    RewardResult,
)

LOWEST, HIGHEST = 1, 20
MAX_GUESSES = 5  # halving what is open needs no more
NARROWED = 0.5  # what a lost game is worth at most

_NUMBER = re.compile(r"[1-9][0-9]?")


def parse_guess(text: str) -> int | None:
    """The number that `text` consists of, or None if it is anything but one whole number in range."""
    text = text.strip(" \t\r\n")
    number = int(text) if _NUMBER.fullmatch(text) else 0
    return number if LOWEST <= number <= HIGHEST else None


def narrow(low: int, high: int, guess: int, secret: int) -> tuple[int, int]:
    """What is still open after a guess. A guess outside of `low` to `high` tells nothing new."""
    if guess < secret:
        return max(low, guess + 1), high
    return low, min(high, guess - 1) if guess > secret else high


def texts_of(messages: Sequence[ChatMessage]) -> list[str]:
    """What the player has said, in order."""
    return [str(message["content"] or "") for message in messages if message["role"] == "assistant"]


def secret_of(example: TaskExample) -> int:
    """The row's number. A row without one is an error, never a lost game."""
    secret = parse_guess(str(example.output))
    if secret is None:
        raise ValueError(f"secret {example.output!r} is not a number from {LOWEST} to {HIGHEST}; fix the row's output")
    return secret


class Guess(EnvironmentMultiTurn):
    """One game an episode. It ends with the number, with the fifth guess, or with something that is no guess."""

    def start_episode(self, example: TaskExample, prompt_text: str) -> list[ChatMessage]:
        return [{"role": "user", "content": str(example.input)}]

    def max_episode_turns(self, example: TaskExample) -> int:
        return MAX_GUESSES

    def step_episode(
        self, example: TaskExample, messages: list[ChatMessage], assistant_response: str
    ) -> EnvironmentStepResult:
        """Answers the newest guess, which `messages` ends with."""
        secret, guess = secret_of(example), parse_guess(assistant_response)
        if guess is None or guess == secret or len(texts_of(messages)) >= MAX_GUESSES:
            return EnvironmentStepResult(done=True)
        hint = "higher" if guess < secret else "lower"
        return EnvironmentStepResult(done=False, messages=({"role": "user", "content": hint},))

    def score_episode(self, example: TaskExample, episode: EnvironmentEpisode) -> RewardResult:
        """1 for the number; for a lost game up to `NARROWED`, by how much of the range was ruled out."""
        secret = secret_of(example)
        low, high, found, guesses = LOWEST, HIGHEST, False, 0
        wasted = 0
        for text in (texts_of(episode.messages) or [episode.response_text])[:MAX_GUESSES]:
            guess = parse_guess(text)
            if guess is None:
                break
            guesses += 1
            wasted += not low <= guess <= high
            low, high = narrow(low, high, guess, secret)
            if guess == secret:
                found = True
                break
        ruled_out = 1 - math.log(high - low + 1) / math.log(HIGHEST - LOWEST + 1)
        return RewardResult(
            score=1.0 if found else NARROWED * ruled_out,
            success=found,
            name="found",
            metrics=(
                RewardMetric(name="guesses", score=float(guesses)),
                RewardMetric(name="wasted_guesses", score=float(wasted)),
            ),
        )

    def sft_completion(self, example: TaskExample) -> list[ChatMessage]:
        """A game played well: always the middle of what is open."""
        secret, low, high = secret_of(example), LOWEST, HIGHEST
        played: list[ChatMessage] = []
        while True:
            guess = (low + high) // 2
            played.append({"role": "assistant", "content": str(guess)})
            if guess == secret:
                return played
            played.append({"role": "user", "content": "higher" if guess < secret else "lower"})
            low, high = narrow(low, high, guess, secret)


def load_environment() -> Guess:
    """Called by Flash, once, before it reads `dataset/`."""
    return Guess()
