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
    """log softmax(scale * h @ W^T)[target] for each row of h.

    d logp / d h = scale * (W[target] - p @ W) needs no incoming gradient, so the forward pass computes it
    chunk by chunk while the logits are at hand, and backward is one product. Two matrix products in all,
    where recomputing the logits in backward would take three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_N_H: Tensor, head_V_H: Tensor, targets_N: Tensor, scale: float, chunk: int
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        logprobs_N = torch.empty(len(hidden_N_H), dtype=torch.float32, device=hidden_N_H.device)
        slope_N_H = torch.empty_like(hidden_N_H) if wants_gradient else None
        for start in range(0, len(hidden_N_H), chunk):
            rows = slice(start, start + chunk)
            targets_C = targets_N[rows]
            logits_C_V = (hidden_N_H[rows] @ head_V_H.t()).float()
            if scale != 1.0:
                logits_C_V *= scale
            top_C = logits_C_V.gather(1, targets_C[:, None])[:, 0]
            norm_C = logits_C_V.logsumexp(dim=1)
            logprobs_N[rows] = top_C - norm_C
            if slope_N_H is not None:
                probs_C_V = logits_C_V.sub_(norm_C[:, None]).exp_().to(head_V_H.dtype)
                slope_N_H[rows] = torch.sub(head_V_H[targets_C], probs_C_V @ head_V_H)
        if slope_N_H is not None:
            ctx.save_for_backward(slope_N_H.mul_(scale) if scale != 1.0 else slope_N_H)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope_N_H,) = ctx.saved_tensors
        return grad_N[:, None].to(slope_N_H.dtype) * slope_N_H, None, None, None, None


def token_logprobs(
    hidden_N_H: Tensor,
    head_V_H: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """fp32 log-probability (N,) of each target token, given the hidden state that predicts it.

    The logits are divided by `temperature`. Gradients reach `hidden_N_H` only; the head must be frozen.
    """
    if head_V_H.requires_grad:
        raise ValueError("the head must be frozen: its gradient is not computed here")
    size = chunk or max(1, _CHUNK_LOGITS // head_V_H.shape[0])
    result: Tensor = _TokenLogprobs.apply(hidden_N_H, head_V_H, targets_N, 1.0 / temperature, size)
    return result


def negative_log_likelihood(logprobs_N: Tensor, *, normaliser: float) -> Tensor:
    """-sum(logprobs) / normaliser.

    The normaliser is the number of trained tokens in the whole optimizer batch, so the gradients of its
    micro-batches add up to the same sum however it is split.
    """
    return -logprobs_N.sum() / normaliser
