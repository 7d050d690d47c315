"""The model that learns: a frozen base wearing one trainable adapter.

Owns building it (fresh, or from an adapter folder) and its forward pass to log-probabilities. Knows
nothing of losses, optimisers or data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flash.errors import ModelError
from flash.inference.loading import BaseModel
from flash.inference.lora import Adapter
from flash.training.batches import MicroBatch
from flash.training.forward import Forward, lean_forward, model_forward
from flash.training.losses import token_logprobs

NAME = "policy"  # the trained adapter's name on its base


@dataclass(frozen=True)
class Policy:
    """One base, and the adapter on it that is being trained."""

    base: BaseModel
    adapter: Adapter
    forward: Forward
    name: str = NAME
    shares_openings: bool = False  # whether the forward makes use of a batch's `sharing`

    def parameters(self) -> list[nn.Parameter]:
        return self.adapter.parameters()

    def logprobs(self, batch: MicroBatch, *, temperature: float = 1.0, reference: bool = False) -> Tensor:
        """fp32 log-probabilities (N,) of the batch's trained tokens, under the adapter or the bare base."""
        # lanes come here side by side, all for the same adapter, which their caller has put on already
        with self.base.adapters.active(None if reference else self.name):
            hidden_N_H = self.forward(batch.tokens_B_T, batch.predictors_N, batch.sharing)
        return token_logprobs(hidden_N_H, self.base.head, batch.targets_N, temperature=temperature)


def build_policy(
    base: BaseModel, *, rank: int, alpha: float, seed: int, init_from: Path | None = None
) -> Policy:
    """A fresh adapter, or the weights of an adapter folder, made trainable.

    Raises ModelError when the folder's rank is not `rank` (alpha may change: it only scales), and when the
    model's head does more than a matrix product, which the trainer's own head would get wrong.
    """
    if init_from is None:
        adapter = base.adapters.create(NAME, rank=rank, alpha=alpha, seed=seed)
    else:
        adapter = base.adapters.load(NAME, init_from, trainable=True, alpha=alpha)
        if adapter.shape.rank != rank:
            raise ModelError(f"the adapter to start from has rank {adapter.shape.rank}, not lora_rank = {rank}")
    _check_head(base)
    lean = lean_forward(base)
    return Policy(base, adapter, lean or model_forward(base), shares_openings=lean is not None)


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
