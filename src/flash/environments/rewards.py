"""Rewards: scoring a group through the SDK's hooks, and what counts as a reward at all.

A result that is missing, malformed, not finite or marked as an error never becomes a number: it is a `Score`
with `error` set. Knows nothing of advantages or retries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from freesolo.contracts.types import ChatMessage
from freesolo.datasets import TaskExample
from freesolo.environments import (
    Environment,
    EnvironmentEpisode,
    EnvironmentSingleTurn,
    EnvironmentTurn,
    RewardMetric,
    RewardResult,
)

from flash.environments.protocol import FinishedEpisode, Message, Score
from flash.errors import UserCodeError

MAX_REWARD = 1e9  # beyond this a reward says nothing and ruins the sums it enters


class Response(str):
    """What a reward is given: the answer, equal to a plain string, with how the model got there.

    `completion` is the answer too (the text after the last `</think>`), `thinking` the trace, `raw` everything.
    """

    completion: str
    thinking: str
    raw: str

    def __new__(cls, completion: str, *, thinking: str = "", raw: str | None = None) -> Response:
        response = super().__new__(cls, completion)
        response.completion = completion
        response.thinking = thinking
        response.raw = completion if raw is None else raw
        return response


def sdk_episode(episode: FinishedEpisode) -> EnvironmentEpisode:
    """The SDK's form of a finished episode, with one turn for each message of the transcript."""
    return EnvironmentEpisode(
        messages=cast("tuple[ChatMessage, ...]", tuple(episode.messages)),
        response_text=Response(
            episode.response_text, thinking=episode.thinking, raw=episode.raw or episode.response_text
        ),
        turns=tuple(_turn(message) for message in episode.messages),
        metadata=episode.metadata,
        total_tokens=episode.total_tokens,
    )


def _turn(message: Message) -> EnvironmentTurn:
    return EnvironmentTurn(
        role=str(message.get("role", "")), content=message.get("content") or "", name=message.get("name")
    )


def score_group(environment: Environment, example: TaskExample, episodes: Sequence[FinishedEpisode]) -> list[Score]:
    """Scores one group; what the environment's code raises passes through.

    `score_episodes` is the hook that reaches every other one in the SDK's defaults. A single-turn environment
    that overrides `score_responses` alone means that one.
    """
    group = [sdk_episode(episode) for episode in episodes]
    if _scores_texts(environment):
        results: Any = environment.score_responses(example, [episode.response_text for episode in group])
    else:
        results = environment.score_episodes(example, group)
    return to_scores(results, expected=len(episodes))


def _scores_texts(environment: Environment) -> bool:
    kind = type(environment)
    return (
        isinstance(environment, EnvironmentSingleTurn)
        and kind.score_responses is not Environment.score_responses
        and kind.score_episodes is Environment.score_episodes
    )


def to_scores(results: Any, *, expected: int) -> list[Score]:
    """One Score for each result; raises UserCodeError when there are not exactly `expected` of them."""
    if not isinstance(results, list | tuple):
        raise UserCodeError(f"scoring returned {type(results).__name__}: it must return a list of RewardResult")
    if len(results) != expected:
        raise UserCodeError(
            f"scoring returned {len(results)} results for {expected} responses: it must return one for each"
        )
    return [to_score(result) for result in results]


def to_score(result: Any) -> Score:
    if not isinstance(result, RewardResult):
        return Score(None, error=f"scoring returned {type(result).__name__}: it must return a RewardResult")
    metrics = {name: value for metric in result.metrics or () for name, value in _metric(metric)}
    if result.error:
        return Score(None, success=False, metrics=metrics, error=f"the reward reports an error: {result.error}")
    number, problem = _number(result.score)
    if number is None:
        return Score(None, metrics=metrics, error=f"score = {_shown(result.score)}: {problem}")
    return Score(number, success=bool(result.resolved_success()), metrics=metrics)


def _number(value: Any) -> tuple[float | None, str]:
    """A finite float of sane size (booleans, NumPy's and torch's scalars included), or why it is none."""
    if isinstance(value, str | bytes) or value is None:
        return None, "must be a number"
    try:
        number = float(value)
    except OverflowError:
        return None, f"must lie within ±{MAX_REWARD:g}"
    except Exception:
        return None, "must be a number"
    if not math.isfinite(number):
        return None, "must be finite"
    if abs(number) > MAX_REWARD:
        return None, f"must lie within ±{MAX_REWARD:g}"
    return number, ""


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _metric(metric: Any) -> list[tuple[str, float]]:
    """A metric's number: its score, else its value, else whether it succeeded; none at all is left out."""
    if not isinstance(metric, RewardMetric):
        return []
    for value in (metric.score, metric.value, metric.success):
        number, _ = _number(value)
        if number is not None:
            return [(str(metric.name), number)]
    return []
