"""The engine in this process: many requests decoded together on a transformers model, with adapters.

Owns the batch: which samples decode now, what each has drawn, when it ends. A prompt is prefilled once for
all its samples, which decode as one row until they differ; finished rows leave the batch, log-probs are
captured while sampling. It shares the model with whoever trains it: an adapter under training is sampled
with its live weights, and nothing is merged. Knows no templates and no rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flash.errors import InvalidInput
from flash.inference.decoding import Decoder, build_decoder
from flash.inference.engine import Completion, Finished, Request, TokenDelta, Watch
from flash.inference.lanes import balanced
from flash.inference.loading import BaseModel
from flash.inference.sampling import Draws, StopMatcher, stream_key

FinishReason = Literal["stop", "length", "cancelled"]

_MAX_ROWS = 256  # samples decoding at once
_MAX_CACHE_TOKENS = 1 << 18  # ... as long as their longest possible transcripts stay under this
_LEAST_ROWS = 32  # fewer are not worth a lane of their own: the interpreter is shared
_STRIDE = 8  # tokens for which lanes go on by themselves: meeting costs two of them a wake-up
_RETIRE_PARTS = 8  # finished rows leave once they are an eighth of the batch: moving the cache costs too


@dataclass
class _Row:
    """One sample in the making."""

    request: int
    sample: int
    key: int
    limit: int
    matcher: StopMatcher | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class TorchEngine:
    """Serves one base model and its adapters; one call at a time."""

    def __init__(
        self,
        base: BaseModel,
        *,
        max_rows: int = _MAX_ROWS,
        max_cache_tokens: int = _MAX_CACHE_TOKENS,
        divisor: int = 1,
        ignore_stop_ids: bool = False,
    ) -> None:
        """`divisor` lessens what decodes at once, after memory ran out. `ignore_stop_ids` decodes past the model's own
        end tokens (for measurements of fixed length)."""
        self._base = base
        self._stop_ids = frozenset() if ignore_stop_ids else frozenset(base.stop_ids)
        self._max_rows = max(1, max_rows // divisor)
        self._max_cache_tokens = max_cache_tokens // divisor
        self._asked = 0  # samples of the newest call
        self._decoders: list[Decoder] = []  # one a lane

    def load_adapter(self, name: str, folder: Path) -> None:
        self._base.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        self._base.adapters.remove(name)

    def generate(self, requests: Sequence[Request], *, watch: Watch | None = None) -> list[list[Completion]]:
        done: dict[tuple[int, int], Completion] = {}
        for finished in self.completions(requests, watch=watch):
            done[finished.request, finished.sample] = finished.completion
        return [[done[i, k] for k in range(request.n)] for i, request in enumerate(requests)]

    def completions(self, requests: Sequence[Request], *, watch: Watch | None = None) -> Iterator[Finished]:
        for row, count in self._run(requests, watch, stride=_STRIDE):
            if row.finish_reason is not None and count == len(row.tokens):
                completion = Completion(tuple(row.tokens), tuple(row.logprobs), row.finish_reason)
                yield Finished(row.request, row.sample, completion)

    def stream(self, requests: Sequence[Request]) -> Iterator[TokenDelta]:
        for row, _ in self._run(requests, None, stride=1):
            yield TokenDelta(row.request, row.sample, row.tokens[-1], row.logprobs[-1], row.finish_reason)

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.clear()

    def shrink(self) -> int | None:
        """Halves what decodes at once: how many samples at most from here on. None: it was one already."""
        rows = min(self._max_rows, self._asked)
        if rows < 2:
            return None
        self._max_rows = rows // 2
        self._max_cache_tokens //= 2
        return self._max_rows

    def _run(self, requests: Sequence[Request], watch: Watch | None, *, stride: int) -> Iterator[tuple[_Row, int]]:
        """Every sample for each of its tokens, with how many these are (a cancelled one may have none).

        Of up to `stride` tokens the first is only told when the last is there.
        """
        self._check(requests)
        self._asked = sum(request.n for request in requests)
        for adapter in dict.fromkeys(request.adapter for request in requests):
            waiting = [
                (i, k) for i, request in enumerate(requests) if request.adapter == adapter for k in range(request.n)
            ]
            with self._wearing(adapter):
                yield from self._decode(self._lanes(requests, waiting), watch, stride)

    def _decode(self, lanes: Sequence[_Lane], watch: Watch | None, stride: int) -> Iterator[tuple[_Row, int]]:
        # the lanes meet after each stride, so that what comes out comes in one order however fast each of them is
        work = [partial(lane.advance, stride if len(lanes) > 1 else 1) for lane in lanes]
        try:
            while moved := [each for part in self._base.lanes.run(work) for each in part]:
                cancelled = watch is not None and watch()
                for row, count in moved:
                    if cancelled and row.finish_reason is None and count == len(row.tokens):
                        row.finish_reason = "cancelled"
                    yield row, count
                if cancelled:
                    for row in (row for lane in lanes for row in lane.batch.waiting_rows()):
                        row.finish_reason = "cancelled"
                        yield row, 0
                    return
        finally:
            for lane in lanes:
                lane.decoder.clear()

    def _lanes(self, requests: Sequence[Request], waiting: list[tuple[int, int]]) -> list[_Lane]:
        """The samples cut into one batch a lane, by index alone."""
        parts = balanced([1] * len(waiting), min(self._base.lanes.count, max(1, len(waiting) // _LEAST_ROWS)))
        while len(self._decoders) < len(parts):
            self._decoders.append(build_decoder(self._base.model))
        return [
            _Lane(
                _Batch(requests, waiting[part.start : part.stop], self._base, self._stop_ids, decoder.forks_cheaply),
                decoder,
                max(1, self._max_rows // len(parts)),
                self._max_cache_tokens // len(parts),
            )
            for part, decoder in zip(parts, self._decoders, strict=False)
        ]

    @contextmanager
    def _wearing(self, adapter: str | None) -> Iterator[None]:
        """The model wears the adapter and is in eval mode; restored afterwards."""
        model = self._base.model
        training = model.training
        model.eval()
        try:
            with self._base.adapters.active(adapter):
                yield
        finally:
            if training:
                model.train()

    def _check(self, requests: Sequence[Request]) -> None:
        context = self._base.context_length
        for number, request in enumerate(requests):
            size, most = len(request.prompt), request.sampling.max_tokens
            if not size:
                raise InvalidInput(f"request {number}: the prompt has no tokens")
            if most < 1 or request.n < 1:
                raise InvalidInput(f"request {number}: max_tokens = {most}, n = {request.n}: must be at least 1")
            if size + most > context:
                raise InvalidInput(
                    f"a prompt of {size} tokens and max_tokens = {most} exceed the {context} tokens that "
                    f"{self._base.name} can attend to",
                    remedy=f"shorten the prompt, or lower max_tokens to {max(context - size, 0)}",
                )
            if request.adapter is not None:
                self._base.adapters[request.adapter]  # raises ModelError when it is not loaded


@dataclass
class _Lane:
    """What one lane decodes, and with which decoder."""

    batch: _Batch
    decoder: Decoder
    max_rows: int
    max_cache_tokens: int

    @torch.inference_mode()  # inside alone: what a consumer computes may need gradients
    def advance(self, stride: int) -> list[tuple[_Row, int]]:
        """Up to `stride` more tokens for every row that decodes; (row, its tokens by then), none when all is done."""
        moved: list[tuple[_Row, int]] = []
        for _ in range(stride):
            self.batch.retire(self.decoder)
            logits = self.decoder.step(self.batch.last_tokens) if self.batch.rows else None
            logits = self._admit(logits)
            if logits is None:
                break
            moved.extend((row, len(row.tokens)) for row in self.batch.draw(logits, self.decoder))
        return moved

    def _admit(self, logits: Tensor | None) -> Tensor | None:
        """Lets waiting samples join, in order, as far as rows and cache allow; all rows' logits."""
        if self.batch.rows and (not self.decoder.joinable or not self.batch.waiting):
            return logits
        prompts, repeats = self.batch.admit(self.max_rows, self.max_cache_tokens)
        if not prompts:
            return logits if self.batch.rows else None
        joined = self.decoder.admit(prompts, repeats, room=len(self.batch.rows))
        return joined if logits is None else torch.cat([logits, joined])


class _Batch:
    """Samples of one adapter: those waiting, and those that decode now. Where the decoder can fork, samples of one
    prompt are one row of its until they differ."""

    def __init__(
        self,
        requests: Sequence[Request],
        waiting: list[tuple[int, int]],
        base: BaseModel,
        stop_ids: frozenset[int],
        shares: bool,
    ) -> None:
        """`waiting` holds (index into `requests`, sample)."""
        self._requests = requests
        self._stop_ids = stop_ids
        self._base = base
        self._device = base.device
        self._matchers: dict[tuple[str, ...], StopMatcher] = {}
        self.waiting = waiting
        self.rows: list[_Row] = []
        self.last_tokens = torch.zeros(0, dtype=torch.long)  # of the decoder's rows
        self._shares = shares
        self._places: list[int] = []  # the decoder's row of each of ours
        self._decoding = 0  # how many these are
        self._draws: Draws | None = None  # None: the rows changed

    def waiting_rows(self) -> Iterator[_Row]:
        for request, sample in self.waiting:
            yield self._row(request, sample)

    def admit(self, max_rows: int, max_cache_tokens: int) -> tuple[list[tuple[int, ...]], list[int]]:
        """Takes the next samples in order while they fit; always one if nothing decodes. What the decoder is to
        admit: prompts, and how many rows of each."""
        prompts: list[tuple[int, ...]] = []
        repeats: list[int] = []
        taken: list[int] = []
        longest = max((self._reach(row.request) for row in self.rows), default=0)
        while self.waiting:
            request, sample = self.waiting[0]
            longest = max(longest, self._reach(request))
            size = len(self.rows) + 1
            if self.rows and (size > max_rows or size * longest > max_cache_tokens):
                break
            known = bool(taken) and taken[-1] == request
            if not known:
                prompts.append(self._requests[request].prompt)
                repeats.append(0)
                taken.append(request)
            if not (known and self._shares):
                repeats[-1] += 1
                self._decoding += 1
            self._places.append(self._decoding - 1)
            self.rows.append(self._row(request, sample))
            self.waiting.pop(0)
            self._draws = None
        return prompts, repeats

    def draw(self, logits_D_V: Tensor, decoder: Decoder) -> list[_Row]:
        """Draws each sample's next token, marks those that it ends, and returns those that got one."""
        if self._draws is None:
            rows = [(self._requests[row.request].sampling, row.key, len(row.tokens)) for row in self.rows]
            self._draws = Draws(rows, self._device)
        alone = len(self.rows) == self._decoding
        logits_B_V = logits_D_V if alone else logits_D_V[torch.tensor(self._places, device=self._device)]
        tokens_B, logprobs_B = self._draws.next(logits_B_V)
        tokens = tokens_B.tolist()
        moved: list[_Row] = []
        for row, token, logprob in zip(self.rows, tokens, logprobs_B.tolist(), strict=True):
            if row.finish_reason is not None:
                continue
            moved.append(row)
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in self._stop_ids or (row.matcher is not None and row.matcher.completed(row.tokens)):
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
        self.last_tokens = tokens_B if alone else self._parted(tokens, decoder)
        return moved

    def _parted(self, tokens: list[int], decoder: Decoder) -> Tensor:
        """Samples of one row that drew different tokens part: the first goes on there, others in copies of it. The
        last tokens of the decoder's rows."""
        last = [0] * self._decoding
        heirs: dict[tuple[int, int], int] = {}  # by row and token
        taken: set[int] = set()
        copied: list[int] = []
        for number, (row, place, token) in enumerate(zip(self.rows, self._places, tokens, strict=True)):
            if row.finish_reason is not None:
                continue
            heir = heirs.get((place, token))
            if heir is None and place in taken:
                heir = len(last)
                copied.append(place)
                last.append(token)
            elif heir is None:
                heir = place
                taken.add(place)
                last[place] = token
            heirs[place, token] = self._places[number] = heir
        if copied:
            decoder.fork(torch.tensor(copied, device=self._device))
            self._decoding = len(last)
            self._line_up()
        return torch.tensor(last, device=self._device)

    def _line_up(self) -> None:
        """Once every sample is a row of the decoder's by itself, they take these rows' order: nothing needs moving
        between them from then on. No row of the decoder's is without a sample, so equal counts mean just that."""
        if len(self.rows) == self._decoding:
            self.rows = [row for _, row in sorted(zip(self._places, self.rows, strict=True), key=itemgetter(0))]
            self._places = list(range(self._decoding))
            self._draws = None

    def retire(self, decoder: Decoder) -> None:
        """Takes the finished samples out, once they are enough to pay for moving the others' cache."""
        kept = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        finished = len(self.rows) - len(kept)
        if not finished or (kept and not self.waiting and finished * _RETIRE_PARTS < len(self.rows)):
            return
        places = sorted({self._places[i] for i in kept})
        if len(places) < self._decoding:
            rows_K = torch.tensor(places, dtype=torch.long, device=self._device)
            decoder.keep(rows_K)
            self.last_tokens = self.last_tokens[rows_K]
        moved = {place: number for number, place in enumerate(places)}
        self.rows = [self.rows[i] for i in kept]
        self._places = [moved[self._places[i]] for i in kept]
        self._decoding = len(places)
        self._draws = None
        self._line_up()

    def _row(self, request: int, sample: int) -> _Row:
        sampling = self._requests[request].sampling
        matcher = None
        if sampling.stop:
            matcher = self._matchers.get(sampling.stop)
            if matcher is None:
                matcher = self._matchers[sampling.stop] = StopMatcher(sampling.stop, self._base.text)
        return _Row(request, sample, stream_key(sampling.seed, sample), sampling.max_tokens, matcher)

    def _reach(self, request: int) -> int:
        return len(self._requests[request].prompt) + self._requests[request].sampling.max_tokens
