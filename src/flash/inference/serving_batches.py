"""What goes through the model while it serves: prompts on their way in, and rows that decode.

Two batches with one face. `MixedBatch` lets rows of any adapters join and leave at any step, takes prompts in
by chunks and keeps their prefixes. `TurnBatch` serves every other layout through the model's own forward:
requests of one adapter that wait together go through together, a few such groups take turns at every step, and
the others wait; it keeps no prefixes, since a recurrent state can't be cut at a token. Neither samples nor knows
who asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flash.inference.adapter_bank import Home
from flash.inference.decoding import CacheDecoder, check_rows_stay_apart
from flash.inference.engine import Request, Scored
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapter
from flash.inference.mixed_decoder import Chunk, MixedDecoder, Opening
from flash.inference.prefix_cache import BLOCK, Owner, PrefixCache
from flash.inference.sampling import score

_GROUPS = 4  # that take turns: more would decode in smaller batches, fewer would make newcomers wait longer
_GROUP_TOKENS = 8192  # padded prompt tokens of a group; bounds its activations
_SCORED_AT_ONCE = 256  # prompt tokens whose logits are held at once


@dataclass(eq=False)
class Loaded:
    """An adapter as it was loaded once; loading it again under its name makes another one."""

    name: str
    key: str  # never used again
    adapter: Adapter
    users: int = 0  # unfinished requests


@dataclass(eq=False)
class Job:
    """A request on its way through a batch."""

    request: Request
    adapter: Loaded | None

    @property
    def key(self) -> str:
        return "" if self.adapter is None else self.adapter.key

    @property
    def rows(self) -> int:
        return self.request.n if self.request.sampling.max_tokens else 0

    @property
    def reach(self) -> int:
        """The tokens of its longest possible transcript."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    @property
    def owner(self) -> Owner:
        return self.key, self.request.cache_scope


@dataclass(frozen=True)
class Ready:
    """A job whose prompt is in. Its rows stand at the end of the batch, in the order of these."""

    job: Job
    cached_tokens: int
    scores: tuple[Scored, ...] | None
    logits_N_V: Tensor | None  # for each of its rows; None: it has none


@dataclass(frozen=True)
class Limits:
    rows: int  # samples decoding at once
    cache_tokens: int  # ... as long as rows times their longest possible transcript stay under this
    prefill_tokens: int  # of prompts that go in between two decoded tokens

    def fit(self, jobs: Iterable[Job]) -> bool:
        rows, reach = 0, 0
        for job in jobs:
            rows += max(1, job.rows)
            reach = max(reach, job.reach)
        return rows <= self.rows and rows * reach <= self.cache_tokens


class Batch(Protocol):
    @property
    def rows(self) -> int: ...

    def choose(self, waiting: Sequence[Job]) -> list[Job]:
        """Those of the waiting jobs, oldest first, that may join now. Decides only, and at once."""

    def start(self, jobs: Sequence[Job]) -> None: ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Appends a token to each row; logits [rows, V] after it."""

    def prefill(self) -> list[Ready]:
        """Takes prompts in, up to a limit; those that are whole now become rows."""

    def drop(self, gone: Sequence[int], finished: Mapping[int, Sequence[int]]) -> list[int]:
        """Takes rows out (ascending). `finished`: the whole transcripts of those that came to their end. The rows
        that are left, in their new order: row i is now what row `order[i]` was."""

    def leave(self, job: Job) -> None:
        """The job is over: whatever else was held for it goes."""

    def forget(self, loaded: Loaded) -> None:
        """No job uses the adapter any more."""

    def clear(self) -> None:
        """Drops all jobs."""

    def stats(self) -> dict[str, float]: ...


@dataclass(eq=False)
class _Intake:
    """A prompt on its way in."""

    job: Job
    opening: Opening
    cached: int
    scores: list[Scored] = field(default_factory=list)


class MixedBatch:
    def __init__(self, decoder: MixedDecoder, limits: Limits, prefix_bytes: int) -> None:
        self._decoder = decoder
        self._limits = limits
        self._prefixes = PrefixCache(prefix_bytes)
        self._intakes: list[_Intake] = []
        self._homes: dict[Job, Home | None] = {}  # of all jobs in the batch
        self._owners: list[Owner] = []  # by row

    @property
    def rows(self) -> int:
        return self._decoder.rows

    def choose(self, waiting: Sequence[Job]) -> list[Job]:
        joined = list(self._homes)
        for job in waiting:  # in order: who does not fit holds up those behind, so that it gets its turn
            joined.append(job)
            if not self._limits.fit(joined) or len({each.key for each in joined} - {""}) > self._decoder.bank.most:
                return joined[len(self._homes) : -1]
        return joined[len(self._homes) :]

    def start(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._homes[job] = None
            if job.adapter is not None:
                self._homes[job] = self._decoder.bank.pin(job.key, job.adapter.adapter)
            self._intakes.append(self._intake(job))

    def _intake(self, job: Job) -> _Intake:
        prompt = job.request.prompt
        # the last token is always computed: its logits are needed; and so are all when the prompt is scored
        usable = 0 if job.request.prompt_logprobs else len(prompt) - 1
        blocks = self._prefixes.longest(job.owner, prompt) if usable else []
        opening = self._decoder.open(len(prompt), blocks)
        opening.length = min(opening.length, usable)
        return _Intake(job, opening, opening.length)

    def step(self, tokens_B: Tensor) -> Tensor:
        return self._decoder.step(tokens_B)

    def prefill(self) -> list[Ready]:
        chunks: list[Chunk] = []
        left = self._limits.prefill_tokens
        for intake in self._intakes:
            request, start = intake.job.request, intake.opening.length
            most = min(left, _SCORED_AT_ONCE) if request.prompt_logprobs else left
            if most <= 0:
                break
            tokens = request.prompt[start : start + most]
            home = self._homes[intake.job]
            chunks.append(Chunk(intake.opening, tokens, home, every=request.prompt_logprobs))
            left -= len(tokens)
        if not chunks:
            return []
        logits = self._decoder.prefill(chunks)
        ready: list[Ready] = []
        for intake, chunk, logits_N_V in zip(list(self._intakes), chunks, logits, strict=False):
            prompt = intake.job.request.prompt
            if chunk.every:
                until = intake.opening.length
                following = prompt[until - len(chunk.tokens) + 1 : until + 1]
                top = intake.job.request.sampling.top_logprobs
                intake.scores.extend(score(logits_N_V[: len(following)], following, top))
            if intake.opening.length == len(prompt):
                self._intakes.remove(intake)
                ready.append(self._ready(intake, logits_N_V[-1:]))
        return ready

    def _ready(self, intake: _Intake, logits_1_V: Tensor) -> Ready:
        job, opening = intake.job, intake.opening
        prompt = job.request.prompt
        self._prefixes.store(job.owner, prompt, lambda start, stop: opening.kv[:, :, :, start:stop].clone())
        scores = tuple(intake.scores) if job.request.prompt_logprobs else None
        if not job.rows:
            return Ready(job, intake.cached, scores, None)
        self._decoder.admit(opening, self._homes[job], job.rows)
        self._owners.extend([job.owner] * job.rows)
        return Ready(job, intake.cached, scores, logits_1_V.expand(job.rows, -1))

    def drop(self, gone: Sequence[int], finished: Mapping[int, Sequence[int]]) -> list[int]:
        for row, transcript in finished.items():
            # the newest token has no keys and values yet
            self._prefixes.store(self._owners[row], transcript[:-1], partial(self._decoder.read, row))
        order = list(range(self.rows))
        for row in reversed(gone):  # holes are filled from the end: as little as possible moves
            last = order.pop()
            if row < len(order):
                order[row] = last
        self._decoder.keep(order)
        self._owners = [self._owners[old] for old in order]
        return order

    def leave(self, job: Job) -> None:
        home = self._homes.pop(job)
        if home is not None:
            self._decoder.bank.unpin(home)
        self._intakes = [intake for intake in self._intakes if intake.job is not job]

    def forget(self, loaded: Loaded) -> None:
        self._prefixes.drop(loaded.key)
        self._decoder.bank.drop(loaded.key)

    def clear(self) -> None:
        for job in list(self._homes):
            self.leave(job)
        self._decoder.clear()
        self._owners = []

    def stats(self) -> dict[str, float]:
        return {
            "prefilling": len(self._intakes),
            "device_adapters": len(self._decoder.bank),
            "cache_bytes": self._decoder.cache_bytes,
            "prefix_tokens": len(self._prefixes) * BLOCK,
            "prefix_bytes": self._prefixes.bytes,
        }


@dataclass(eq=False)
class _Group:
    """Requests of one adapter that came together, with a cache of their own."""

    decoder: CacheDecoder
    jobs: list[Job]
    begun: bool = False  # their prompts are in

    @property
    def key(self) -> str:
        return self.jobs[0].key


class TurnBatch:
    """Rows lie group after group, in the groups' order."""

    def __init__(self, base: BaseModel, limits: Limits) -> None:
        check_rows_stay_apart(base.model)
        self._base = base
        self._limits = limits
        self._groups: list[_Group] = []

    @property
    def rows(self) -> int:
        return sum(group.decoder.rows for group in self._groups)

    def choose(self, waiting: Sequence[Job]) -> list[Job]:
        chosen: list[Job] = []
        inside = [job for group in self._groups for job in group.jobs]
        for job in waiting if len(self._groups) < _GROUPS else ():
            if job.key != waiting[0].key:  # whoever waits longest decides which adapter comes next
                continue
            padded = (len(chosen) + 1) * max(len(each.request.prompt) for each in (*chosen, job))
            if (chosen and padded > _GROUP_TOKENS) or not self._limits.fit([*inside, *chosen, job]):
                break
            chosen.append(job)
        return chosen

    def start(self, jobs: Sequence[Job]) -> None:
        if jobs:
            self._groups.append(_Group(CacheDecoder(self._base.model), list(jobs)))

    def step(self, tokens_B: Tensor) -> Tensor:
        logits: list[Tensor] = []
        first = 0
        for group in self._groups:
            if rows := group.decoder.rows:
                with self._wearing(group):
                    logits.append(group.decoder.step(tokens_B[first : first + rows]))
                first += rows
        return torch.cat(logits)

    def prefill(self) -> list[Ready]:
        return [ready for group in self._groups if not group.begun for ready in self._begin(group)]

    def _begin(self, group: _Group) -> list[Ready]:
        group.begun = True
        ready: list[Ready] = []
        with self._wearing(group):
            decoding = [job for job in group.jobs if job.rows]
            if decoding:
                prompts = [job.request.prompt for job in decoding]
                logits_B_V = group.decoder.admit(prompts, [job.rows for job in decoding])
            first = 0
            for job in group.jobs:
                scores = self._scores(job.request) if job.request.prompt_logprobs else None
                ready.append(Ready(job, 0, scores, logits_B_V[first : first + job.rows] if job.rows else None))
                first += job.rows
        return ready

    def _scores(self, request: Request) -> tuple[Scored, ...]:
        """A forward of its own, the head in pieces."""
        tokens = torch.tensor([request.prompt[:-1]], device=self._base.device)
        if not tokens.shape[1]:
            return ()
        hidden_T_H = self._base.backbone(input_ids=tokens, use_cache=False).last_hidden_state[0]
        head = self._base.model.get_output_embeddings()
        found: list[Scored] = []
        for start in range(0, len(hidden_T_H), _SCORED_AT_ONCE):
            logits_N_V = head(hidden_T_H[start : start + _SCORED_AT_ONCE])
            following = request.prompt[start + 1 : start + 1 + len(logits_N_V)]
            found.extend(score(logits_N_V, following, request.sampling.top_logprobs))
        return tuple(found)

    def drop(self, gone: Sequence[int], finished: Mapping[int, Sequence[int]]) -> list[int]:
        leaving = set(gone)
        order: list[int] = []
        first = 0
        for group in self._groups:
            rows = group.decoder.rows
            kept = [row for row in range(rows) if first + row not in leaving]
            if len(kept) < rows:
                group.decoder.keep(torch.tensor(kept, dtype=torch.long, device=self._base.device))
            order.extend(first + row for row in kept)
            first += rows
        return order

    def leave(self, job: Job) -> None:
        for group in self._groups:
            if job in group.jobs:
                group.jobs.remove(job)
        self._groups = [group for group in self._groups if group.jobs]

    def forget(self, loaded: Loaded) -> None:
        pass

    def clear(self) -> None:
        self._groups = []

    def stats(self) -> dict[str, float]:
        return {"prefilling": sum(len(group.jobs) for group in self._groups if not group.begun)}

    def _wearing(self, group: _Group) -> AbstractContextManager[None]:
        return self._base.adapters.active(group.key or None)
