"""The chunked head on every layout: the model's own numbers, tied or not, and never the whole table of logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.layouts.checkpoints import Layout
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GraniteConfig, GraniteForCausalLM

from flash.catalog.catalog import load_catalog
from flash.errors import ModelError
from flash.inference.loading import BaseModel, load_base
from flash.inference.lora import Adapters
from flash.training.batches import collate
from flash.training.losses import token_logprobs
from flash.training.policy import build_policy

VOCABULARY = 248_320  # of the Qwen3.5 models
SHIPPED = {entry.id: entry for entry in load_catalog(Path("/nowhere"))}


def test_log_probabilities_are_the_models_own(layout: Layout, base: BaseModel) -> None:
    policy = build_policy(base, rank=4, alpha=8, seed=0)
    rows = [list(range(3, 70)), list(range(100, 120))]
    batch = collate(rows, [[True] * len(row) for row in rows], pad_id=base.pad_id, device=base.device)
    for temperature in (1.0, 0.7):
        ours = policy.logprobs(batch, temperature=temperature)
        theirs = []
        for row in rows:
            with torch.no_grad():
                logits = base.model(torch.tensor([row])).logits[0, :-1] / temperature
            theirs.append(logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0])
        assert torch.allclose(ours, torch.cat(theirs), atol=2e-5)


def test_heads_are_tied_where_the_catalog_says_so(layout: Layout, base: BaseModel) -> None:
    tied = base.head is base.model.get_input_embeddings().weight
    shapes = [SHIPPED[model].shape for model in layout.models]
    assert tied in {shape.tied for shape in shapes if shape is not None}
    adapted = base.adapters.create("a", rank=2, alpha=2, seed=0).pairs
    assert not any("lm_head" in path or "embed" in path for path in adapted)


@pytest.mark.parametrize("fault", ["bias", "scaled"])
def test_a_head_that_is_more_than_a_product_is_refused(fault: str, checkpoints: dict[str, Path]) -> None:
    base = load_base(checkpoints["MiniCPM5"], device="cpu")
    if fault == "bias":
        head = base.model.lm_head
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features), requires_grad=False)
    else:
        config = GraniteConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, logits_scaling=8.0, initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(0)
        model: Any = GraniteForCausalLM(config).eval()
        base = dataclasses.replace(base, model=model, adapters=Adapters(model))
    with pytest.raises(ModelError, match="output layer is not a plain one"):
        build_policy(base, rank=4, alpha=8, seed=0)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


@pytest.mark.parametrize("tokens", [100, 300])
def test_the_whole_table_of_logits_is_never_made(tokens: int) -> None:
    """tests/catalog/test_fit.py measures the memory of a whole step; here no single tensor may be that large."""
    generator = torch.Generator().manual_seed(0)
    hidden_N_H = torch.randn(tokens, 8, generator=generator).requires_grad_()
    head_V_H = torch.randn(VOCABULARY, 8, generator=generator)
    targets_N = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    with Largest() as largest:
        token_logprobs(hidden_N_H, head_V_H, targets_N).sum().backward()
    assert VOCABULARY * 8 <= largest.numbers <= 1 << 24 < tokens * VOCABULARY
    assert hidden_N_H.grad is not None
