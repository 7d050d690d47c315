"""What training may ask of an environment, wherever its code runs.

Two implementations: `loading.LocalEnvironment` runs the user's code in this process (the environment host,
`flash env check`, tests); `worker.environment_host.RemoteEnvironment` asks a host in another process. Both are
safe to call from several threads. Rows are addressed by (split, index): the example itself stays with the environment.

Calls raise `UserCodeError` when the environment's code raised, hung past its limit or died, and
`InvalidInput` when its data breaks the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]  # {"role", "content", ...} as in the SDK and OpenAI's chat format


@dataclass(frozen=True)
class Rows:
    """One split, reduced to input/output/metadata and written to a file of JSON lines."""

    split: str
    path: str
    count: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnvironmentInfo:
    multi_turn: bool
    splits: tuple[str, ...]  # packaged splits, e.g. ("train", "eval")
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpisodeStart:
    messages: list[Message]
    max_turns: int


@dataclass(frozen=True)
class SFTTarget:
    prompt: list[Message]
    completion: list[Message]


@dataclass(frozen=True)
class StepResult:
    done: bool
    messages: list[Message] = field(default_factory=list)
    final_response_text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedEpisode:
    """One episode to score.

    `response_text` is the text after the last `</think>` of the last action (contract §6);
    `raw` and `thinking` go along so that a reward can read them.
    """

    messages: list[Message]  # the whole transcript, opening prompt included
    response_text: str
    raw: str = ""
    thinking: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    total_tokens: int | None = None


@dataclass(frozen=True)
class Score:
    """A reward, or why there is none. `error` set means: no reward; it is never read as zero."""

    reward: float | None
    success: bool | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class EnvironmentClient(Protocol):
    def info(self) -> EnvironmentInfo: ...

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        """The rows of a split (None: the run's own); `limit` keeps the head of the file (0 = all)."""

    def targets(self, split: str, indices: Sequence[int]) -> list[SFTTarget]:
        """`start_episode` + `sft_completion` of each row."""

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]: ...

    def step(self, split: str, index: int, messages: list[Message], response: str, *, seed: int) -> StepResult: ...

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        """Scores a group of episodes of one row through the SDK's group hooks; same length as `episodes`."""

    def close(self) -> None: ...
