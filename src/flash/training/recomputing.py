"""Less memory for more time: layers that are computed again in the backward pass.

Owns the switch on a loaded base. When it is thrown is `fitting`'s to say: only when a row fits no other way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from flash.inference.loading import BaseModel


def recompute_layers(base: BaseModel) -> None:
    """From here on the model's own forward keeps only each layer's input, and backward computes the layer again.

    A third more work. The backward pass must run while the base wears the adapter that the forward pass met.
    """
    layers: Any = base.backbone.layers
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # nothing in the model is random: there are no generators to put back
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
