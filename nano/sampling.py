"""A plain batched sampler for development: greedy or at a temperature, with a key-value cache.

Enough for evaluating and probing a base model; the product's own engine lives in `flash.inference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token or `max_tokens`; the stop token is part of what returns."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tokens = torch.tensor(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(list(stop_ids))
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    cache = DynamicCache()
    columns: list[torch.Tensor] = []
    for _ in range(max_tokens):
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        if temperature == 0.0:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        columns.append(torch.where(finished, torch.full_like(chosen, -1), chosen))
        finished |= torch.isin(chosen, stops)
        if bool(finished.all()):
            break
        tokens = chosen[:, None]
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], 1)
        positions = positions[:, -1:] + 1
    return [[token for token in row if token >= 0] for row in torch.stack(columns, 1).tolist()]
