"""The model that learns: a frozen base wearing one trainable adapter.

Owns building it (fresh, or from an adapter folder), choosing a forward pass whose rows know nothing of each other,
and the way to log-probabilities. Knows nothing of losses, optimisers or data.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flash.errors import ModelError
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapter
from flash.training.batches import MicroBatch, collate
from flash.training.forward import Forward, LeanForward, lean_forward, lone_rows_forward, model_forward
from flash.training.losses import token_logprobs
from flash.training.recomputing import recompute_layers

_TOLERANCE = (1e-3, 5e-2)  # between hidden states that ought to be equal: in fp32, and in narrower numbers
NAME = "policy"  # the trained adapter's name on its base


@dataclass
class Policy:
    """One base, and the adapter on it that is being trained."""

    base: BaseModel
    adapter: Adapter
    forward: Forward
    name: str = NAME
    recomputes: bool = False  # whether backward computes each layer again, to keep less

    def parameters(self) -> list[nn.Parameter]:
        return self.adapter.parameters()

    @property
    def shares_openings(self) -> bool:
        """Whether the forward makes use of a batch's `sharing`."""
        return isinstance(self.forward, LeanForward)

    @property
    def bare_forward(self) -> Forward | None:
        """The bare base's, if it can be asked while the adapter is worn."""
        return self.forward.without_adapter() if isinstance(self.forward, LeanForward) else None

    def recompute(self) -> None:
        """Needs less memory from here on, and more time."""
        if self.recomputes:
            return
        recompute_layers(self.base)
        if isinstance(self.forward, LeanForward):  # it calls no layer
            self.forward = model_forward(self.base)
        self.recomputes = True

    def logprobs(self, batch: MicroBatch, *, temperature: float = 1.0, reference: bool = False) -> Tensor:
        """fp32 log-probabilities (N,) of the batch's trained tokens, under the adapter or the bare base."""
        forward, worn = self.forward, None if reference else self.name
        if reference and (bare := self.bare_forward):
            forward, worn = bare, self.base.adapters.active_name
        predictors_M, rows_N = batch.distinct_predictors()
        # lanes come here side by side, all for the same adapter, which their caller has put on already
        with self.base.adapters.active(worn):
            hidden_M_H = forward(batch.tokens_B_T, predictors_M, batch.sharing)
        return token_logprobs(hidden_M_H, self.base.head, batch.targets_N, rows_N, temperature=temperature)


def build_policy(
    base: BaseModel, *, rank: int, alpha: float, seed: int, init_from: Path | None = None
) -> Policy:
    """A fresh adapter, or the weights of an adapter folder, made trainable.

    Raises ModelError when the folder's rank is not `rank` (alpha may change: it only scales), when the
    model's head does more than a matrix product, which the trainer's own head would get wrong, and when a token
    sees those after it.
    """
    if init_from is None:
        adapter = base.adapters.create(NAME, rank=rank, alpha=alpha, seed=seed)
    else:
        adapter = base.adapters.load(NAME, init_from, trainable=True, alpha=alpha)
        if adapter.shape.rank != rank:
            raise ModelError(f"the adapter to start from has rank {adapter.shape.rank}, not lora_rank = {rank}")
    _check_head(base)
    forward: Forward = lean_forward(base) or model_forward(base)
    if not rows_stay_apart(base, forward):
        forward = lone_rows_forward(base)
        logging.getLogger(__name__).warning(
            "%s: rows of one batch affect each other, so each is computed by itself, which is slower", base.name
        )
    return Policy(base, adapter, forward)


@torch.no_grad()
def rows_stay_apart(base: BaseModel, forward: Forward) -> bool:
    """Whether rows padded into one batch, which share their opening, come out as each does alone.

    What crosses from row to row, through padding, a recurrent state or a kernel, would never show in a loss. Raises
    ModelError when even a lone row is not causal: then a token is told what it should predict.
    """
    vocabulary = base.head.shape[0]
    # past the chunks of 64 in which linear attention works
    long = [(7 * place + 3) % vocabulary for place in range(min(70, base.context_length))]
    short = long[:4] + [(5 * place + 11) % vocabulary for place in range(9)]
    with base.adapters.active(None):
        alone = [_hidden(base, row) for row in (long, short)]
        gap = _gap(_hidden(base, long[:40]), alone[0][:40])
        if not gap <= _TOLERANCE[base.dtype != torch.float32]:
            raise ModelError(
                f"{base.name}: a token's hidden state depends on the tokens after it (by {gap:.2g}), so it can't be "
                "trained to predict them",
                remedy="choose a causal language model",
            )
        masks = [[True] * len(row) for row in (long, short)]
        batch = collate([long, short], masks, pad_id=base.pad_id, device=base.device, openings=[(0, 4), (0, 4)])
        together = forward(batch.tokens_B_T, batch.predictors_N, batch.sharing)
    rows = zip(together.split([len(hidden) - 1 for hidden in alone]), alone, strict=True)
    return all(_gap(ours, theirs[:-1]) <= _TOLERANCE[base.dtype != torch.float32] for ours, theirs in rows)


def _hidden(base: BaseModel, row: list[int]) -> Tensor:
    """Hidden states (T, H) of a row by itself."""
    tokens_1_T = torch.tensor([row], device=base.device)
    hidden_1_T_H: Tensor = base.backbone(input_ids=tokens_1_T, use_cache=False).last_hidden_state
    return hidden_1_T_H[0]


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """The difference of a row's states, as a share of their size. Not the largest one: in narrow numbers rounding
    alone may send a token to another expert."""
    return float((ours - theirs).float().norm() / theirs.float().norm().clamp(min=1e-6))


@torch.no_grad()
def _check_head(base: BaseModel) -> None:
    """Our log-probabilities are the model's own; layouts that scale or cap their logits fail here."""
    vocabulary = base.head.shape[0]
    tokens = torch.tensor([[(7 * place + 3) % vocabulary for place in range(8)]], device=base.device)
    with base.adapters.active(None):
        theirs = base.model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        hidden = base.backbone(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
    ours = token_logprobs(hidden, base.head, tokens[0, 1:])
    gap = (theirs.gather(1, tokens[0, 1:, None])[:, 0] - ours).abs().max().item()
    if not gap <= (1e-3 if base.dtype == torch.float32 else 0.1):
        raise ModelError(f"{base.name}: its output layer is not a plain one (log-probabilities differ by {gap:.2g})")
