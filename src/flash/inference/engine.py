"""Tokens in, tokens and log-probs out: the one protocol for rollouts, evaluation and serving.

Implementations: `torch_engine.TorchEngine` (transformers' models in this process) and
`scripted_engine.ScriptedEngine` (canned answers, for tests). No chat templates, no HTTP, no rewards here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature = 0` is greedy. `seed` alone decides a request's randomness.

    `tempered_logprobs` asks for log-probabilities under the tempered distribution (before top-p): what a
    trainer that follows the tempered policy compares its own with.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    tempered_logprobs: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt and how many completions of it. Sample i draws from (sampling.seed, i)."""

    prompt: tuple[int, ...]          # token ids
    sampling: Sampling
    n: int = 1
    adapter: str | None = None       # a loaded adapter's name; None is the bare base


@dataclass(frozen=True)
class Completion:
    """`tokens` holds every sampled token, the end-of-turn or stop sequence's tokens included.

    `logprobs[i]` is the fp32 log-probability of `tokens[i]` under the untempered model with the adapter
    (but see `Sampling.tempered_logprobs`).
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Finished:
    """One completion as soon as it is there."""

    request: int  # index into the requests given
    sample: int
    completion: Completion


@dataclass(frozen=True)
class TokenDelta:
    request: int   # index into the requests given
    sample: int
    token: int
    logprob: float
    finish_reason: Literal["stop", "length", "cancelled"] | None = None


Watch = Callable[[], bool]
"""Asked once per decoded token (of the whole batch): true cancels what is unfinished. It also serves as a
sign of life."""


class Engine(Protocol):
    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a PEFT adapter folder under `name`; loading the same name again replaces it."""

    def unload_adapter(self, name: str) -> None: ...

    def generate(self, requests: Sequence[Request], *, watch: Watch | None = None) -> list[list[Completion]]:
        """All completions, one list of `n` a request, in the requests' order.

        Deterministic on a CPU: batches form by index, never by arrival. Raises InvalidInput for a request
        that can't be served (an empty prompt, more tokens than the model's context, no such adapter).
        """

    def completions(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Finished]:
        """The same completions, each as soon as it is finished; closing the iterator cancels the rest."""

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenDelta]:
        """The same completions token by token; closing the iterator cancels what is unfinished."""

    def close(self) -> None: ...
