"""Catalog entries of small models, and the transformers configs that the same sizes make."""

from __future__ import annotations

from typing import Any

from flash.catalog.catalog import Catalog, ModelEntry
from flash.catalog.shapes import parameter_count
from flash.config.recipes import resolve
from flash.config.run import RunConfig, RunSpec


def entry_of(layout: str, *, experts: dict[str, int] | None = None, **sizes: Any) -> ModelEntry:
    """An entry with these sizes; linear attention in three layers of four where the layout has it."""
    shape = {
        "hidden": 256, "ffn": 512, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 512, "tied": True,
    } | sizes  # fmt: skip
    hybrid = layout.startswith("qwen3_5")
    shape.setdefault("full_layers", shape["layers"] // 4 if hybrid else shape["layers"])
    if hybrid:
        shape.setdefault("linear", {"key_heads": 2, "value_heads": 4, "head_dim": 128, "conv": 4})
    if layout.endswith("moe"):
        experts = experts or {"count": 8, "active": 2}
    fields = {"id": f"test/{layout}", "layout": layout, "context": 65_536, "shape": shape, "experts": experts}
    entry = ModelEntry.model_validate({**fields, "params": 1})
    return entry.model_copy(update={"params": parameter_count(entry)})


def spec_of(entry: ModelEntry, algorithm: str, **train: Any) -> RunSpec:
    config = {"model": entry.id, "algorithm": algorithm, "environment": {"id": "org/task"}, "train": train}
    return resolve(RunConfig.model_validate(config), catalog=Catalog((entry,)))


def config_of(entry: ModelEntry) -> Any:
    """The text model's transformers config."""
    from transformers import LlamaConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3Config

    shape = entry.shape
    assert shape is not None
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }
    if shape.linear is not None:
        every = shape.layers // max(shape.full_layers, 1)
        fields |= {
            "layer_types": [
                "full_attention" if shape.full_layers and place % every == every - 1 else "linear_attention"
                for place in range(shape.layers)
            ],
            "linear_num_key_heads": shape.linear.key_heads,
            "linear_num_value_heads": shape.linear.value_heads,
            "linear_key_head_dim": shape.linear.head_dim,
            "linear_value_head_dim": shape.linear.head_dim,
            "linear_conv_kernel_dim": shape.linear.conv,
        }
    if entry.experts is not None:
        del fields["intermediate_size"]
        fields |= {
            "moe_intermediate_size": shape.ffn,
            "shared_expert_intermediate_size": shape.ffn,
            "num_experts": entry.experts.count,
            "num_experts_per_tok": entry.experts.active,
        }
    kinds = {"qwen3": Qwen3Config, "llama": LlamaConfig, "qwen3_5": Qwen3_5TextConfig,
             "qwen3_5_moe": Qwen3_5MoeTextConfig}  # fmt: skip
    return kinds[entry.layout](**fields)
