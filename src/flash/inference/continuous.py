"""The serving engine in this process: requests of many callers, decoded together as they come and go.

Owns the queue, the one thread that touches the model, what each sample has drawn, and who is told what. What
goes through the model is `serving_batches`'; a token depends on its request alone (seed, sample, position),
never on its neighbours. Knows no templates and no HTTP.
"""

from __future__ import annotations

import itertools
import logging
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from llguidance import LLMatcher
from torch import Tensor

from flash.errors import Busy, FlashError, InternalError, InvalidInput, ModelError, OutOfMemory, Unavailable
from flash.inference import structured
from flash.inference.engine import Failed, Prefilled, Request, Sampled, Scored, Sink, Ticket
from flash.inference.loading import BaseModel
from flash.inference.mixed_decoder import build_mixed_decoder
from flash.inference.sampling import Draws, StopMatcher, likeliest, stream_key
from flash.inference.serving_batches import Batch, Job, Limits, Loaded, MixedBatch, Ready, TurnBatch

_MAX_ROWS = 64
_MAX_CACHE_TOKENS = 1 << 18  # ... however much memory there is
_MAX_WAITING = 256  # requests
_PREFILL_TOKENS = {"cpu": 512, "gpu": 2048}  # more at once is no faster, and holds up those who decode
_PREFIX_BYTES = 256 << 20
_MAX_DEVICE_ADAPTERS = 64


@dataclass(eq=False)
class _Served(Job):
    """A submitted request with who wants to know; it is its own ticket."""

    engine: ContinuousEngine
    sink: Sink
    grammar: LLMatcher | None = None  # as it begins
    left: int = 0  # samples that are not finished
    over: bool = False  # cancelled, failed or done: nothing more is told

    def cancel(self) -> None:
        self.engine.cancel(self)

    def tell(self, news: Prefilled | Sampled | Failed) -> None:
        if self.over:
            return
        try:
            self.sink(news)
        except Exception as error:  # someone else's code: its request ends, and no other
            self.over = True
            logging.getLogger(__name__).warning("a sink raised; its request is dropped", exc_info=error)


@dataclass(eq=False)
class _Row:
    """One sample in the making."""

    job: _Served
    sample: int
    key: int
    stops: StopMatcher | None
    grammar: LLMatcher | None
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class ContinuousEngine:
    """A `ServingEngine` on a transformers model. Layouts that `MixedDecoder` knows mix adapters within a batch;
    others decode each adapter's rows by themselves (see `TurnBatch`)."""

    def __init__(
        self,
        base: BaseModel,
        *,
        max_rows: int = _MAX_ROWS,
        max_cache_tokens: int | None = None,
        max_waiting: int = _MAX_WAITING,
        prefill_tokens: int | None = None,
        prefix_bytes: int = _PREFIX_BYTES,
        max_device_adapters: int = _MAX_DEVICE_ADAPTERS,
    ) -> None:
        """`max_cache_tokens` bounds rows times their longest possible transcript (None: what half of the free memory
        holds), `prefill_tokens` how much of prompts goes in between two decoded tokens, `prefix_bytes` what is kept
        of past prompts."""
        self._base = base
        self._limits = Limits(
            max_rows,
            max_cache_tokens or _affordable_tokens(base),
            prefill_tokens or _PREFILL_TOKENS["cpu" if base.device.type == "cpu" else "gpu"],
        )
        self._max_waiting = max_waiting
        self._vocabulary: int = base.model.get_input_embeddings().num_embeddings
        self._grammars = structured.Grammars(base.tokenizer, vocabulary=self._vocabulary, stop_ids=base.stop_ids)
        self._stop_ids = frozenset(base.stop_ids)
        self._stop_matchers: dict[tuple[str, ...], StopMatcher] = {}
        base.model.eval()
        mixed = build_mixed_decoder(base.model, max_adapters=max_device_adapters, lanes=base.lanes)
        self._adapters_lie_on = None if mixed is None else torch.device("cpu")  # the bank takes them to the device
        self._batch: Batch = (
            TurnBatch(base, self._limits) if mixed is None else MixedBatch(mixed, self._limits, prefix_bytes)
        )
        # what only the engine's thread touches
        self._rows: list[_Row] = []
        self._draws: Draws | None = None  # None: the rows changed
        self._last_tokens = torch.zeros(0, dtype=torch.long, device=base.device)
        # what every thread touches, under the condition's lock
        self._changed = threading.Condition()
        self._waiting: deque[_Served] = deque()
        self._running: list[_Served] = []
        self._adapters: dict[str, Loaded] = {}
        self._retired: list[Loaded] = []  # unloaded or replaced
        self._serials = itertools.count()
        self._closed = False
        self._totals = {"requests_total": 0, "prompt_tokens_total": 0, "tokens_total": 0, "prefix_hit_tokens_total": 0}
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # --- any thread ---

    def load_adapter(self, name: str, folder: Path) -> None:
        """Requests in flight under the name go on with the weights they began with.

        Raises ModelError for files that are missing, broken or for another base.
        """
        key = f"{name}#{next(self._serials)}"
        loaded = Loaded(name, key, self._base.adapters.load(key, folder, device=self._adapters_lie_on))
        with self._changed:
            if name in self._adapters:
                self._retired.append(self._adapters.pop(name))
            self._adapters[name] = loaded
            self._changed.notify_all()

    def unload_adapter(self, name: str) -> None:
        """Refuses new requests for the adapter at once, and waits for those in flight. One that is not loaded is
        no error."""
        with self._changed:
            loaded = self._adapters.pop(name, None)
            if loaded is None:
                return
            self._retired.append(loaded)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or loaded not in self._retired)

    def submit(self, request: Request, sink: Sink) -> Ticket:
        self._check(request)
        grammar = None
        if request.sampling.grammar is not None:
            grammar = self._grammars.matcher(request.sampling.grammar)
        with self._changed:
            if self._closed:
                raise Unavailable("the engine is closed")
            adapter = None
            if request.adapter is not None:
                adapter = self._adapters.get(request.adapter)
                if adapter is None:
                    raise ModelError(f"no adapter named {request.adapter!r} is loaded")
            if len(self._waiting) >= self._max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting already", remedy="try again in a moment")
            job = _Served(request, adapter, self, sink, grammar)
            if adapter is not None:
                adapter.users += 1
            self._totals["requests_total"] += 1
            self._waiting.append(job)
            self._changed.notify_all()
            return job

    def cancel(self, job: _Served) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._release(job)
            job.over = True
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        with self._changed:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "rows": len(self._rows),
                "adapters": len(self._adapters),
                **self._batch.stats(),
                **self._totals,
            }

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self, request: Request) -> None:
        sampling, size, context = request.sampling, len(request.prompt), self._base.context_length
        if not size:
            raise InvalidInput("the prompt has no tokens")
        if not all(0 <= token < self._vocabulary for token in request.prompt):
            raise InvalidInput(f"the prompt has token ids outside of this model's 0 to {self._vocabulary - 1}")
        least = 0 if request.prompt_logprobs else 1
        if sampling.max_tokens < least or request.n < 1:
            raise InvalidInput(f"max_tokens = {sampling.max_tokens}, n = {request.n}: must be at least 1")
        if size + sampling.max_tokens > context:
            raise InvalidInput(
                f"a prompt of {size} tokens and max_tokens = {sampling.max_tokens} exceed the {context} tokens that "
                f"{self._base.name} can attend to",
                remedy=f"shorten the prompt, or lower max_tokens to {max(context - size, 0)}",
            )
        if not self._limits.fit([Job(request, None)]):
            limits = self._limits
            raise InvalidInput(
                f"n = {request.n} answers of up to {size + sampling.max_tokens} tokens are more than this server's "
                f"{limits.rows} at once and {limits.cache_tokens} tokens in all",
                remedy="lower n or max_tokens",
            )

    def _release(self, job: _Served) -> None:
        """The job is out of queue and batch; under the lock."""
        if job.adapter is not None:
            job.adapter.users -= 1
        self._changed.notify_all()

    # --- the engine's thread ---

    def _serve(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:
                    self._fail_all(_explained(error))
            self._fail_all(Unavailable("the engine was closed"))
        with self._changed:
            for job in self._waiting:
                job.tell(Failed(Unavailable("the engine was closed")))
                job.over = True
                self._release(job)
            self._waiting.clear()

    def _wait(self) -> bool:
        """Sleeps until there is something to do; false once the engine is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._waiting or self._running or any(not each.users for each in self._retired)
            )
            return not self._closed

    def _turn(self) -> None:
        """Who goes and who comes, then one more token for every row."""
        self._leave()
        with self._changed:
            chosen = [job for job in self._batch.choose(self._waiting) if isinstance(job, _Served)]
            for job in chosen:
                self._waiting.remove(job)
                self._running.append(job)
        self._batch.start(chosen)
        logits = [self._batch.step(self._last_tokens)] if self._rows else []
        for ready in self._batch.prefill():
            self._begin(ready)
            if ready.logits_N_V is not None:
                logits.append(ready.logits_N_V)
        if logits:
            self._draw(torch.cat(logits) if len(logits) > 1 else logits[0])

    def _begin(self, ready: Ready) -> None:
        job = ready.job
        assert isinstance(job, _Served)
        self._totals["prompt_tokens_total"] += len(job.request.prompt)
        self._totals["prefix_hit_tokens_total"] += ready.cached_tokens
        job.tell(Prefilled(ready.cached_tokens, ready.scores))
        job.left = job.rows
        if not job.left:
            job.over = True
        sampling = job.request.sampling
        for sample in range(job.rows):
            grammar = None if job.grammar is None else job.grammar.deep_copy()
            key = stream_key(sampling.seed, sample)
            self._rows.append(_Row(job, sample, key, self._stops_of(sampling.stop), grammar))
            self._draws = None

    def _draw(self, logits_B_V: Tensor) -> None:
        """Draws each row's next token and tells it; rows that end leave at once."""
        if self._draws is None:
            rows = [(row.job.request.sampling, row.key, len(row.tokens)) for row in self._rows]
            self._draws = Draws(rows, self._base.device)
        banned = None
        if any(row.grammar is not None for row in self._rows):
            table = structured.banned([row.grammar for row in self._rows], logits_B_V.shape[1])
            banned = torch.from_numpy(table).to(self._base.device)
        self._last_tokens, logprobs_B = self._draws.next(logits_B_V, banned)
        tops = self._tops(logits_B_V)
        drawn = zip(self._rows, self._last_tokens.tolist(), logprobs_B.tolist(), strict=True)
        for i, (row, token, logprob) in enumerate(drawn):
            if not row.job.over:
                self._tell(row, Scored(token, logprob, tops.get(i, ())))
        self._leave()

    def _tops(self, logits_B_V: Tensor) -> dict[int, tuple[tuple[int, float], ...]]:
        """By row, the alternatives that its request wants to see."""
        wanted = {i: row.job.request.sampling.top_logprobs for i, row in enumerate(self._rows)}
        wanted = {i: count for i, count in wanted.items() if count}
        if not wanted:
            return {}
        best = likeliest(logits_B_V[list(wanted)], max(wanted.values()))
        return {i: top[:count] for (i, count), top in zip(wanted.items(), best, strict=True)}

    def _tell(self, row: _Row, scored: Scored) -> None:
        job, token = row.job, scored.token
        row.tokens.append(token)
        self._totals["tokens_total"] += 1
        reason: Literal["stop", "length"] | None = None
        if token in self._stop_ids or (row.stops is not None and row.stops.completed(row.tokens)):
            reason = "stop"
        elif len(row.tokens) >= job.request.sampling.max_tokens:
            reason = "length"
        elif row.grammar is not None and not row.grammar.consume_token(token):
            problem = " ".join(row.grammar.get_error().split()) or "no token can follow"
            job.tell(Failed(InvalidInput(f"the JSON schema became too complex to follow: {problem}")))
            job.over = True
            return
        job.tell(Sampled(row.sample, scored, reason))
        if reason is not None:
            row.finished = True
            job.left -= 1
            job.over = job.over or not job.left

    def _leave(self) -> None:
        """Takes out finished rows and jobs that are over, and adapters that nobody needs any more."""
        gone = [i for i, row in enumerate(self._rows) if row.finished or row.job.over]
        if gone:
            order = self._batch.drop(gone, {i: self._transcript(i) for i in gone if self._rows[i].finished})
            self._rows = [self._rows[i] for i in order]
            self._last_tokens = self._last_tokens[order]
            self._draws = None
        with self._changed:
            for job in [job for job in self._running if job.over]:
                self._running.remove(job)
                self._batch.leave(job)
                self._release(job)
            for loaded in [each for each in self._retired if not each.users]:
                self._retired.remove(loaded)
                self._batch.forget(loaded)
                self._base.adapters.remove(loaded.key)
                self._changed.notify_all()

    def _transcript(self, row: int) -> Sequence[int]:
        return [*self._rows[row].job.request.prompt, *self._rows[row].tokens]

    def _fail_all(self, error: FlashError) -> None:
        """Gives up on everything in the batch; what waits may have better luck."""
        for job in self._running:
            job.tell(Failed(error))
            job.over = True
        with self._changed:
            for job in self._running:
                self._release(job)
            self._running = []
        self._rows, self._draws = [], None
        self._last_tokens = self._last_tokens[:0]
        self._batch.clear()

    def _stops_of(self, stop: tuple[str, ...]) -> StopMatcher | None:
        if not stop:
            return None
        if stop not in self._stop_matchers:
            if len(self._stop_matchers) >= self._max_waiting:
                self._stop_matchers.clear()
            self._stop_matchers[stop] = StopMatcher(stop, self._base.text)
        return self._stop_matchers[stop]


def _affordable_tokens(base: BaseModel) -> int:
    """How many tokens' keys and values half of the device's free memory holds; one whole context at least."""
    config = base.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = sum(kind == "full_attention" for kind in kinds)
    size = 2 * layers * config.num_key_value_heads * head_dim * base.dtype.itemsize
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(base.context_length, min(_MAX_CACHE_TOKENS, free // 2 // size))


def _explained(error: Exception) -> FlashError:
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory("the device has too little memory for the requests of this moment", remedy="send fewer")
    logging.getLogger(__name__).error("serving failed", exc_info=error)
    return InternalError(f"the engine failed: {type(error).__name__}: {error}", detail=traceback.format_exc())
