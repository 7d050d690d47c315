"""One GRPO update: from scored groups to a step of the optimizer, and what was measured on the way.

Owns micro-batches, the comparison of sampler and trainer (the canary), and the guard against gradients
that are no numbers. Knows nothing of environments, prompts or how episodes came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flash.config.run import RunSpec
from flash.errors import InternalError
from flash.training.advantages import all_equal, group_advantages
from flash.training.batches import OVERHEAD_TOKENS, MicroBatch, collate, lane_batches
from flash.training.fitting import MicroBatches
from flash.training.optimizer import Gradients, learning_rate, optimizer_step
from flash.training.policy import Policy
from flash.training.rollouts import Episode, Group
from flash.training.surrogate import k3, token_surrogate

_MISMATCH_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # nats a token, sampler against trainer


@dataclass(frozen=True)
class Row:
    episode: Episode
    advantage: float


Batch = list[Row]  # one micro-batch's


@dataclass
class Totals:
    """Sums over an update's tokens."""

    tokens: int = 0
    mismatch: float = 0.0
    kl: float = 0.0
    kl_tokens: int = 0
    clipped: float = 0.0
    loss: float = 0.0

    def add(self, other: Totals) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Updater:
    """Applies a step's groups to the policy, one optimizer step for all of them."""

    def __init__(
        self,
        spec: RunSpec,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batches: MicroBatches | None = None,
        mismatch_limit: float | None = None,
    ) -> None:
        """`micro_batches` are the recipe's unless given. `mismatch_limit` (nats a token) is how far sampler and trainer
        may differ before the run fails."""
        assert spec.train.max_tokens and spec.train.kl_penalty_coef is not None
        assert spec.recipe.clip_epsilon is not None and spec.recipe.importance_cap is not None
        self._policy = policy
        self._optimizer = optimizer
        self._parameters = policy.parameters()
        self._kl_coef = spec.train.kl_penalty_coef
        self._max_tokens = spec.train.max_tokens
        self._clip_epsilon = spec.recipe.clip_epsilon
        self._importance_cap = spec.recipe.importance_cap
        self._recipe = spec.recipe
        default_limit = _MISMATCH_LIMIT.get(policy.base.dtype, 0.1)
        self._mismatch_limit = default_limit if mismatch_limit is None else mismatch_limit
        self._peak_rate = spec.train.learning_rate
        self._total_steps = spec.train.steps or 1
        self._micro_batches = micro_batches or MicroBatches(spec.recipe.micro_batch_tokens)
        # the rollouts' own temperature: the policy that is improved is the one that was sampled
        self._temperature = spec.train.temperature or 1.0

    def update(self, groups: Sequence[Group], *, step: int) -> dict[str, float]:
        """Optimizer step `step` (from 1) on the groups that carry a gradient; its metrics.

        Without any such group the policy stays as it is. The normaliser counts every completion of the
        step, also of groups that are skipped: they are part of the mean, as zeros. Raises InternalError when
        sampler and trainer disagree beyond rounding, InvalidInput for a gradient that is no number.
        """
        rows = self._rows(groups)
        # every other group in turn: one forward in sixteen of a step's tokens, at groups of eight
        probes = self._probes(groups[step % 2 :: 2] or groups)
        totals = self._micro_batches.fitting(
            partial(self._gradient, rows, probes, groups),
            [len(row.episode.tokens) for row in rows or probes],
            what=f"the update of step {step}",
        )
        mismatch = totals.mismatch / max(totals.tokens, 1)
        self._check_sampler(mismatch)
        rate = learning_rate(self._peak_rate, self._recipe, step=step, total_steps=self._total_steps)
        grad_norm = 0.0
        if rows:
            grad_norm = optimizer_step(
                self._optimizer, self._parameters, rate=rate, max_grad_norm=self._recipe.max_grad_norm, step=step
            )
        return {
            "loss": totals.loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "kl": totals.kl / max(totals.kl_tokens, 1),
            "mismatch_kl": mismatch,
            "clipped": totals.clipped / max(totals.tokens, 1),
        }

    def _gradient(self, rows: Sequence[Row], probes: Sequence[Row], groups: Sequence[Group]) -> Totals:
        """Gives the parameters the step's gradient, and measures on the way."""
        for parameter in self._parameters:
            parameter.grad = None  # of a pass that ran out of memory
        normaliser = self._max_tokens * sum(len(group.episodes) for group in groups)
        totals = Totals()
        shares = self._shares(rows)
        references = self._logprobs(shares, reference=True) if self._kl_coef else None
        work: list[Callable[[], tuple[Totals, Gradients | None]]] = [
            partial(self._accumulate, share, references[lane] if references else None, normaliser)
            for lane, share in enumerate(shares)
        ]
        measured = [] if self._kl_coef else [partial(self._measure_kl, share) for share in self._shares(probes)]
        beside = self._policy.bare_forward is not None  # the base can be asked while the adapter is worn
        lanes, adapters = self._policy.base.lanes, self._policy.base.adapters
        with adapters.active(self._policy.name):
            found = lanes.run([*work, *measured] if beside else work)
        if not beside:
            with adapters.active(None):
                found += lanes.run(measured)
        for part, gradients in found:
            totals.add(part)
            if gradients is not None:
                gradients.apply()
        if not rows:
            self._measure_mismatch(probes, totals)
        return totals

    def _probes(self, groups: Sequence[Group]) -> list[Row]:
        """One episode a group: it tells how far the policy is from its base, and is the canary when nothing is
        trained."""
        return [Row(group.episodes[0], 0.0) for group in groups]

    def _rows(self, groups: Sequence[Group]) -> list[Row]:
        """The episodes to train on: of every group under a penalty, else of those whose rewards differ."""
        return [
            Row(episode, advantage)
            for group in groups
            if self._kl_coef or not all_equal(group.rewards)
            for episode, advantage in zip(group.episodes, group_advantages(group.rewards), strict=True)
        ]

    def _shares(self, rows: Sequence[Row]) -> list[list[Batch]]:
        """For each lane its part of the rows, in micro-batches of like length under the token budget."""
        base, tokens, shares = self._policy.base, self._micro_batches.tokens, self._policy.shares_openings
        # where openings are shared and padding costs nothing, groups stay together; else rows of like length
        by_device = OVERHEAD_TOKENS.get(base.device.type, OVERHEAD_TOKENS["cuda"])
        lanes = lane_batches(
            [row.episode.tokens for row in rows],
            lanes=base.lanes.count,
            token_budget=tokens,
            overhead_tokens=tokens if shares else by_device,
            shares_openings=shares,
        )
        return [[[rows[number] for number in batch] for batch in lane] for lane in lanes]

    def _collated(self, rows: Batch) -> MicroBatch:
        return collate(
            [row.episode.tokens for row in rows],
            [row.episode.sampled for row in rows],
            pad_id=self._policy.base.pad_id,
            device=self._policy.base.device,
            openings=_openings([row.episode for row in rows]) if self._policy.shares_openings else None,
        )

    def _accumulate(
        self, share: Sequence[Batch], references: Sequence[Tensor] | None, normaliser: int
    ) -> tuple[Totals, Gradients | None]:
        """One lane's part of the totals and of the gradient."""
        totals, gradients = Totals(), Gradients(self._parameters)
        for number, rows in enumerate(share):
            reference_N = references[number] if references else None
            logprobs_N = self._policy.logprobs(self._collated(rows), temperature=self._temperature)
            sampled_N, advantages_N = self._token_values(rows)
            surrogate = token_surrogate(
                logprobs_N,
                sampled_N,
                advantages_N,
                clip_epsilon=self._clip_epsilon,
                importance_cap=self._importance_cap,
                reference_logprobs_N=reference_N,
                kl_coef=self._kl_coef,
            )
            loss = surrogate.loss / normaliser
            gradients.add(loss)
            totals.loss += loss.item()
            totals.tokens += len(logprobs_N)
            totals.mismatch += k3(sampled_N, logprobs_N.detach()).sum().item()
            totals.clipped += surrogate.clipped.item()
            if reference_N is not None:
                totals.kl += surrogate.kl.item()
                totals.kl_tokens += len(logprobs_N)
        return totals, gradients

    @torch.no_grad()
    def _measure_kl(self, share: Sequence[Batch]) -> tuple[Totals, None]:
        """One lane's part of how far the sampler is from the bare base."""
        totals = Totals()
        for rows in share:
            reference_N = self._policy.logprobs(self._collated(rows), temperature=self._temperature, reference=True)
            totals.kl += k3(self._token_values(rows)[0], reference_N).sum().item()
            totals.kl_tokens += len(reference_N)
        return totals, None

    def _measure_mismatch(self, rows: Sequence[Row], totals: Totals) -> None:
        shares = self._shares(rows)
        for share, found in zip(shares, self._logprobs(shares, reference=False), strict=True):
            for batch, logprobs_N in zip(share, found, strict=True):
                totals.mismatch += k3(self._token_values(batch)[0], logprobs_N).sum().item()
                totals.tokens += len(logprobs_N)

    def _logprobs(self, shares: Sequence[Sequence[Batch]], *, reference: bool) -> list[list[Tensor]]:
        """Without a graph, for each share and micro-batch, under the policy's adapter or (`reference`) none."""

        @torch.no_grad()
        def of(share: Sequence[Batch]) -> list[Tensor]:
            return [
                self._policy.logprobs(self._collated(rows), temperature=self._temperature, reference=reference)
                for rows in share
            ]

        base = self._policy.base
        with base.adapters.active(None if reference else self._policy.name):
            return base.lanes.run([partial(of, share) for share in shares])

    def _token_values(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(sampler's log-probs, advantages) of the sampled tokens, in the micro-batch's order."""
        sampled = [np.asarray(row.episode.logprobs, dtype=np.float32)[np.asarray(row.episode.sampled)] for row in rows]
        advantages = [
            np.full(len(tokens), row.advantage, dtype=np.float32) for tokens, row in zip(sampled, rows, strict=True)
        ]
        device = self._policy.base.device
        return (
            torch.from_numpy(np.concatenate(sampled)).to(device),
            torch.from_numpy(np.concatenate(advantages)).to(device),
        )

    def _check_sampler(self, mismatch: float) -> None:
        """The canary: rollouts come from the policy that is trained, adapter and all."""
        limit = self._mismatch_limit
        if not mismatch <= limit:
            raise InternalError(
                f"the sampler and the trainer disagree by {mismatch:.3g} nats a token (at most {limit:g} is rounding): "
                "the rollouts do not come from the policy that is trained"
            )


def _openings(episodes: Sequence[Episode]) -> list[tuple[int, int]]:
    """For each episode, the first one with the same prompt, and the prompt's length: it is computed once."""
    first: dict[tuple[int, ...], int] = {}
    return [
        (first.setdefault(tuple(episode.tokens[: episode.prompt_length]), number), episode.prompt_length)
        for number, episode in enumerate(episodes)
    ]
