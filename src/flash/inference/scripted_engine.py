"""An engine that answers from a script: for tests of whatever stands on an engine, and for nothing else.

It keeps the promises of both protocols, `Engine` and `ServingEngine` (limits, stops, log-probs, cancellation,
order, a bounded queue, prefixes), without a model. Grammars it does not follow: a script says what it says.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from flash.errors import Busy, InvalidInput, ModelError, Unavailable
from flash.inference.engine import (
    Completion,
    Failed,
    Finished,
    Prefilled,
    Request,
    Sampled,
    Scored,
    Sink,
    Ticket,
    TokenDelta,
    Watch,
)
from flash.inference.sampling import Decode, StopMatcher

Script = Callable[[Request, int], Sequence[int]]
"""The tokens that sample i of a request would draw, however long: the engine cuts them as it must."""


class ScriptedEngine:
    """Draws what `script(request, sample)` says, each token at log-probability `logprob`.

    A completion ends after a stop id, a stop sequence (if `decode` is given), `max_tokens`, or the
    script's end (as if it had stopped). `requests` keeps everything it was asked for.

    Serving: each step gives every running request one token of each unfinished sample, then pauses for
    `step_seconds`; at most `max_running` requests run and `max_waiting` wait. The alternatives of a token t
    are t + 1, t + 2, ... at ever lower log-probability. A prompt's tokens count as cached as far as an
    earlier prompt of the same adapter and scope began with them, its last token excepted.
    """

    def __init__(
        self,
        script: Script,
        *,
        stop_ids: Sequence[int] = (),
        decode: Decode | None = None,
        logprob: float = -1.0,
        context_length: int = 1 << 20,
        step_seconds: float = 0.0,
        max_running: int = 64,
        max_waiting: int = 256,
    ) -> None:
        self._script = script
        self._stop_ids = frozenset(stop_ids)
        self._decode = decode
        self._logprob = logprob
        self._context_length = context_length
        self._step_seconds = step_seconds
        self._max_running = max_running
        self._max_waiting = max_waiting
        self.adapters: dict[str, Path | None] = {"policy": None}
        self.requests: list[Request] = []
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._seen: list[tuple[str | None, str, tuple[int, ...]]] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._tokens_total = 0
        self._prefix_hit_tokens_total = 0

    def load_adapter(self, name: str, folder: Path) -> None:
        with self._changed:
            self.adapters[name] = folder
            self._seen = [entry for entry in self._seen if entry[0] != name]

    def unload_adapter(self, name: str) -> None:
        with self._changed:
            self.adapters.pop(name, None)
            self._seen = [entry for entry in self._seen if entry[0] != name]
            self._changed.wait_for(lambda: not self._in_flight(name))

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

    def submit(self, request: Request, sink: Sink) -> Ticket:
        with self._changed:
            if self._closed:
                raise Unavailable("the engine is closed")
            self._check(request, least=0 if request.prompt_logprobs else 1)
            if len(self._waiting) >= self._max_waiting:
                raise Busy(f"{self._max_waiting} requests are waiting already")
            self.requests.append(request)
            job = _Job(self, request, sink)
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="scripted-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return job

    def stats(self) -> dict[str, float]:
        with self._changed:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "adapters": len(self.adapters),
                "tokens_total": self._tokens_total,
                "prefix_hit_tokens_total": self._prefix_hit_tokens_total,
            }

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def leave(self, job: _Job) -> None:
        with self._changed:
            job.left = True
            if job in self._waiting:
                self._waiting.remove(job)
            if job in self._running:
                self._running.remove(job)
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._running or self._waiting)
                if self._closed:
                    break
                while self._waiting and len(self._running) < self._max_running:
                    self._running.append(self._waiting.popleft())
                jobs = list(self._running)
            for job in jobs:
                self._advance(job)
                if job.done:
                    self.leave(job)
            if self._step_seconds:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, timeout=self._step_seconds)
        for job in [*self._running, *self._waiting]:
            job.tell(Failed(Unavailable("the engine was closed")))

    def _advance(self, job: _Job) -> None:
        """One token for each sample of the request; on its first turn, the prompt."""
        request = job.request
        if job.pending is None:
            with self._changed:
                cached = self._cached(request)
                self._prefix_hit_tokens_total += cached
            prompt = tuple(self._scored(request, token) for token in request.prompt[1:])
            job.tell(Prefilled(cached, prompt if request.prompt_logprobs else None))
            job.pending = {}
            for k in range(request.n) if request.sampling.max_tokens else ():
                job.pending[k] = self._sampled(request, k)
            return
        for news in job.pending.values():
            if news:
                job.tell(news.popleft())
                self._tokens_total += 1

    def _sampled(self, request: Request, k: int) -> deque[Sampled]:
        completion = self._completion(request, k)
        if not completion.tokens:
            raise ValueError("a script gives at least one token")
        news = [Sampled(k, self._scored(request, token)) for token in completion.tokens]
        news[-1] = replace(news[-1], finish_reason="stop" if completion.finish_reason == "stop" else "length")
        return deque(news)

    def _scored(self, request: Request, token: int) -> Scored:
        ranks = range(request.sampling.top_logprobs)
        return Scored(token, self._logprob, tuple((token + rank, self._logprob - rank) for rank in ranks))

    def _cached(self, request: Request) -> int:
        longest = 0
        if not request.prompt_logprobs:
            for adapter, scope, prompt in self._seen:
                if (adapter, scope) == (request.adapter, request.cache_scope):
                    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, request.prompt[:-1], strict=False))
                    longest = max(longest, len(list(same)))
        self._seen.append((request.adapter, request.cache_scope, request.prompt))
        return longest

    def _in_flight(self, name: str) -> bool:
        return any(job.request.adapter == name for job in (*self._running, *self._waiting))

    def _check(self, request: Request, *, least: int) -> None:
        size, most = len(request.prompt), request.sampling.max_tokens
        if not size:
            raise InvalidInput("the prompt has no tokens")
        if most < least or request.n < 1:
            raise InvalidInput(f"max_tokens = {most}, n = {request.n}: must be at least 1")
        if size + most > self._context_length:
            raise InvalidInput(
                f"a prompt of {size} tokens and max_tokens = {most} exceed the context of {self._context_length} tokens"
            )
        if request.adapter is not None and request.adapter not in self.adapters:
            raise ModelError(f"no adapter named {request.adapter!r} is loaded")

    def _all(self, requests: Sequence[Request]) -> Iterator[tuple[int, int, Completion]]:
        for request in requests:
            self._check(request, least=1)
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


@dataclass(eq=False)
class _Job:
    """One submitted request, which is its own ticket."""

    engine: ScriptedEngine
    request: Request
    sink: Sink
    left: bool = False
    pending: dict[int, deque[Sampled]] | None = None  # by sample; None before the first turn

    @property
    def done(self) -> bool:
        return self.pending is not None and not any(self.pending.values())

    def cancel(self) -> None:
        self.engine.leave(self)

    def tell(self, news: Prefilled | Sampled | Failed) -> None:
        if not self.left:
            self.sink(news)

