"""An engine that answers from a script: for tests of whatever stands on an engine, and for nothing else.

It keeps the protocol's promises (limits, stops, log-probs, cancellation, order) without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flash.errors import InvalidInput, ModelError
from flash.inference.engine import Completion, Finished, Request, TokenDelta, Watch
from flash.inference.sampling import Decode, StopMatcher

Script = Callable[[Request, int], Sequence[int]]
"""The tokens that sample i of a request would draw, however long: the engine cuts them as it must."""


class ScriptedEngine:
    """Draws what `script(request, sample)` says, each token at log-probability `logprob`.

    A completion ends after a stop id, a stop sequence (if `decode` is given), `max_tokens`, or the
    script's end (as if it had stopped). `requests` keeps everything it was asked for.
    """

    def __init__(
        self,
        script: Script,
        *,
        stop_ids: Sequence[int] = (),
        decode: Decode | None = None,
        logprob: float = -1.0,
    ) -> None:
        self._script = script
        self._stop_ids = frozenset(stop_ids)
        self._decode = decode
        self._logprob = logprob
        self.adapters: dict[str, Path | None] = {"policy": None}
        self.requests: list[Request] = []

    def load_adapter(self, name: str, folder: Path) -> None:
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        self.adapters.pop(name, None)

    def generate(self, requests: Sequence[Request], *, watch: Watch | None = None) -> list[list[Completion]]:
        done = {(f.request, f.sample): f.completion for f in self.completions(requests, watch=watch)}
        return [[done[i, k] for k in range(request.n)] for i, request in enumerate(requests)]

    def completions(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Finished]:
        for i, k, completion in self._all(requests):
            if watch is not None and watch():
                completion = replace(completion, tokens=(), logprobs=(), finish_reason="cancelled")
            yield Finished(i, k, completion)

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenDelta]:
        for i, k, completion in self._all(requests):
            last = len(completion.tokens) - 1
            for position, token in enumerate(completion.tokens):
                reason = completion.finish_reason if position == last else None
                yield TokenDelta(i, k, token, self._logprob, reason)

    def close(self) -> None:
        pass

    def _all(self, requests: Sequence[Request]) -> Iterator[tuple[int, int, Completion]]:
        for request in requests:
            if not request.prompt:
                raise InvalidInput("the prompt has no tokens")
            if request.adapter is not None and request.adapter not in self.adapters:
                raise ModelError(f"no adapter named {request.adapter!r} is loaded")
        self.requests.extend(requests)
        for i, request in enumerate(requests):
            for k in range(request.n):
                yield i, k, self._completion(request, k)

    def _completion(self, request: Request, sample: int) -> Completion:
        sampling = request.sampling
        matcher = StopMatcher(sampling.stop, self._decode) if sampling.stop and self._decode else None
        tokens: list[int] = []
        for token in list(self._script(request, sample))[: sampling.max_tokens]:
            tokens.append(token)
            if token in self._stop_ids or (matcher is not None and matcher.completed(tokens)):
                return self._made(tokens, stopped=True)
        return self._made(tokens, stopped=len(tokens) < sampling.max_tokens)

    def _made(self, tokens: list[int], *, stopped: bool) -> Completion:
        return Completion(tuple(tokens), (self._logprob,) * len(tokens), "stop" if stopped else "length")
