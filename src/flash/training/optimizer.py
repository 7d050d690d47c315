"""The optimizer and its learning-rate schedule, as the recipe sets them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flash.config.run import Recipe
from flash.errors import InvalidInput


def build_optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe, *, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def learning_rate(peak: float, recipe: Recipe, *, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 1): a linear rise over the warm-up, then flat or falling.

    The falling schedule reaches zero just after the last step, and no step is spent at zero.
    """
    warmup = min(math.ceil(recipe.warmup_ratio * total_steps), total_steps - 1)
    if step <= warmup:
        return peak * step / (warmup + 1)
    if recipe.lr_schedule == "constant":
        return peak
    return peak * (total_steps - step + 1) / (total_steps - warmup)


class Gradients:
    """A sum of gradients in the parameters' order, kept apart from the parameters until `apply`: lanes that work
    side by side each fill their own, and adding those up in the lanes' order gives the same bits every time."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar loss."""
        found = torch.autograd.grad(loss, self._parameters)
        if self._sums:
            for total, gradient in zip(self._sums, found, strict=True):
                total += gradient
        else:
            self._sums = list(found)

    def apply(self) -> None:
        """Adds the sums to the parameters' own `grad`."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    *,
    rate: float,
    max_grad_norm: float,
    step: int,
) -> float:
    """Clips, updates, clears the gradients; returns the gradient's norm before clipping.

    Raises InvalidInput when the gradient is not finite: a step on it would ruin the adapter for good.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not math.isfinite(norm):
        raise InvalidInput(
            f"the gradient of step {step} is {norm}", remedy="lower train.learning_rate, or check the rows for outliers"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
