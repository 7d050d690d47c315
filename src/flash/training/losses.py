"""Log-probabilities of chosen tokens through a frozen head, and the losses made of them. Pure functions.

The full table of logits (tokens x vocabulary) is never held: the head runs in chunks, on trained
positions only, and its weight gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 24  # logits held at once: 64 MB in fp32


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(scale * h @ W^T)[target] for each target, where h is the row of hidden states that it is asked of.

    d logp / d h = scale * (W[target] - p @ W) needs no incoming gradient, so the forward pass computes it chunk by
    chunk while the logits are at hand; targets of one row share its -p @ W. Two matrix products in all, where
    recomputing the logits in backward would take three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_M_H: Tensor,
        head_V_H: Tensor,
        targets_N: Tensor,
        rows_N: Tensor | None,
        scale: float,
        chunk: int,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        rows = len(hidden_M_H)
        norms_M = torch.empty(rows, dtype=torch.float32, device=hidden_M_H.device)
        top_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_M_H.device)
        # d logp / d h over the scale; without W[target] where targets share rows
        slope_M_H = torch.empty_like(hidden_M_H) if wants_gradient else None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits_C_V = (hidden_M_H[part] @ head_V_H.t()).float()
            if scale != 1.0:
                logits_C_V *= scale
            if rows_N is None:
                top_N[part] = logits_C_V.gather(1, targets_N[part, None])[:, 0]
            else:
                own = ((rows_N >= start) & (rows_N < start + chunk)).nonzero()[:, 0] if chunk < rows else slice(None)
                top_N[own] = logits_C_V[rows_N[own] - start, targets_N[own]]
            most_C_1 = logits_C_V.amax(dim=1, keepdim=True)
            mass_C_V = logits_C_V.sub_(most_C_1).exp_()
            sums_C_1 = mass_C_V.sum(dim=1, keepdim=True)
            norms_M[part] = sums_C_1.log().add_(most_C_1)[:, 0]
            if slope_M_H is not None:
                slope_C_H = (mass_C_V.to(head_V_H.dtype) @ head_V_H).div_(-sums_C_1)
                slope_M_H[part] = slope_C_H if rows_N is not None else slope_C_H.add_(head_V_H[targets_N[part]])
            del logits_C_V, mass_C_V  # before the next ones are there
        if slope_M_H is not None:
            ctx.save_for_backward(slope_M_H, *(() if rows_N is None else (head_V_H, targets_N, rows_N)))
            ctx.scale = scale
        return top_N - (norms_M if rows_N is None else norms_M[rows_N])

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        slope_M_H, *asked = ctx.saved_tensors
        grad_N = grad_N * ctx.scale
        if not asked:
            return grad_N[:, None].to(slope_M_H.dtype) * slope_M_H, *[None] * 5
        head_V_H, targets_N, rows_N = asked
        grad_M = grad_N.new_zeros(len(slope_M_H)).index_add_(0, rows_N, grad_N)
        grad_M_H = grad_M[:, None] * slope_M_H
        grad_M_H.index_add_(0, rows_N, grad_N[:, None] * head_V_H[targets_N])
        return grad_M_H.to(slope_M_H.dtype), *[None] * 5


def token_logprobs(
    hidden_M_H: Tensor,
    head_V_H: Tensor,
    targets_N: Tensor,
    rows_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """fp32 log-probability (N,) of each target token, given the hidden state that predicts it.

    `rows_N` says which row of the hidden states that is; without it there is one row a target. The logits are divided
    by `temperature`. Gradients reach `hidden_M_H` only; the head must be frozen.
    """
    if head_V_H.requires_grad:
        raise ValueError("the head must be frozen: its gradient is not computed here")
    size = chunk or max(1, _CHUNK_LOGITS // head_V_H.shape[0])
    result: Tensor = _TokenLogprobs.apply(hidden_M_H, head_V_H, targets_N, rows_N, 1.0 / temperature, size)
    return result


def negative_log_likelihood(logprobs_N: Tensor, *, normaliser: float) -> Tensor:
    """-sum(logprobs) / normaliser.

    The normaliser is the number of trained tokens in the whole optimizer batch, so the gradients of its
    micro-batches add up to the same sum however it is split.
    """
    return -logprobs_N.sum() / normaliser
