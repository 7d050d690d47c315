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
    top_logprobs: int = 0  # how many alternatives to report beside each token (serving)
    grammar: str | None = None  # what `structured.compile_schema` made: tokens outside it are never drawn (serving)


@dataclass(frozen=True)
class Request:
    """One prompt and how many completions of it. Sample i draws from (sampling.seed, i)."""

    prompt: tuple[int, ...]          # token ids
    sampling: Sampling
    n: int = 1
    adapter: str | None = None       # a loaded adapter's name; None is the bare base
    prompt_logprobs: bool = False    # serving: report the prompt's own log-probabilities
    cache_scope: str = ""            # serving: prefixes are shared within one scope (an org) and adapter only


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


# --- serving: many callers, one model ---------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A token with its fp32 log-probability and the `top_logprobs` likeliest alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Prefilled:
    """The prompt is in; comes once, before the first `Sampled`.

    `cached_tokens` of it were taken from the prefix cache. `prompt` scores every prompt token but the first,
    when `Request.prompt_logprobs` asked for it.
    """

    cached_tokens: int
    prompt: tuple[Scored, ...] | None = None


@dataclass(frozen=True)
class Sampled:
    """One more token of one sample. `finish_reason` is set on a sample's last token."""

    sample: int
    scored: Scored
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Failed:
    """The request can't go on; nothing follows."""

    error: Exception


Sink = Callable[[Prefilled | Sampled | Failed], None]
"""Called from the engine's thread for every piece of news; it must return at once and never raise."""


class Ticket(Protocol):
    def cancel(self) -> None:
        """Takes the request out of the batch; at most one more piece of news arrives after this returns."""


class ServingEngine(Protocol):
    """Requests join and leave a running batch; adapters of one base are mixed freely within it.

    Every method may be called from any thread.
    """

    def load_adapter(self, name: str, folder: Path) -> None: ...

    def unload_adapter(self, name: str) -> None:
        """Waits for the requests in flight on it."""

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Raises InvalidInput for what can't be served and `errors.Busy` when the queue is full.

        `max_tokens = 0` is allowed together with `prompt_logprobs` (log-likelihoods): one `Prefilled` and,
        for each sample, nothing more.
        """

    def stats(self) -> dict[str, float]:
        """Gauges and counters for /metrics: running, waiting, tokens_total, prefix_hit_tokens_total, ..."""

    def close(self) -> None: ...
