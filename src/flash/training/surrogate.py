"""GRPO's objective over tokens: importance weights, clipping, the KL penalty, the constant normaliser.

Pure tensors of one shape; knows no model, no batches and no rewards. The recipe is Dr. GRPO's (Liu et al.
2025): a sum over tokens divided by a constant, so that no completion's length changes a token's weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """The summed loss of some tokens, and what a person wants to know of it (sums over the same tokens)."""

    loss: Tensor  # scalar, to be divided by the step's normaliser
    kl: Tensor  # k3 estimate against the reference; 0 without one
    clipped: Tensor  # tokens whose ratio lies where clipping stops their gradient


def k3(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) from tokens drawn from p: q/p - 1 - log(q/p), never negative."""
    log_ratio = log_q - log_p
    return torch.expm1(log_ratio) - log_ratio


def token_surrogate(
    logprobs_N: Tensor,
    sampled_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_epsilon: float,
    importance_cap: float,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Surrogate:
    """The clipped policy-gradient loss of N tokens.

    `sampled_logprobs_N` are the behaviour policy's: the sampler's own, which one update a batch lets stand for
    the old policy's. The ratio between trainer and sampler is truncated at `importance_cap` token by token
    (a product over a sequence would mask everything), then clipped as in PPO.
    """
    ratio_N = torch.exp(logprobs_N - sampled_logprobs_N).clamp(max=importance_cap)
    clipped_N = ratio_N.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    gain_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    loss = -gain_N.sum()
    stopped_N = ((ratio_N > clipped_N) & (advantages_N > 0)) | ((ratio_N < clipped_N) & (advantages_N < 0))
    kl = torch.zeros((), device=loss.device)
    if reference_logprobs_N is not None:
        kl_N = k3(logprobs_N, reference_logprobs_N)
        loss = loss + kl_coef * kl_N.sum()
        kl = kl_N.detach().sum()
    return Surrogate(loss, kl, stopped_N.sum())
