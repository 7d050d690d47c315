"""Where a catalog entry and a model's own files differ.

The shipped facts were put together from public sources, an operator's by hand; the files are right. A difference
makes estimates wrong, not a run, so it is told and no more. Reads `config.json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flash.catalog.catalog import ModelEntry

_SIZES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
}
_LINEAR = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "head_dim": "linear_value_head_dim",
    "conv": "linear_conv_kernel_dim",
}
_MISSING = object()


def differences(entry: ModelEntry, folder: Path) -> list[str]:
    """One line for each fact that `config.json` in `folder` gives another value; none where it gives none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(config, dict):
        return []
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    return [
        f"{entry.id}: its catalog entry says {name} = {_shown(ours)}, its config.json {_shown(theirs)}: estimates of "
        "memory and cost may be off; correct it in models.toml"
        for name, ours, theirs in _compared(entry, text, config)
        if theirs is not _MISSING and theirs is not None and theirs != ours
    ]


def _compared(
    entry: ModelEntry, text: Mapping[str, Any], whole: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    layout = text.get("model_type", _MISSING)
    yield "layout", entry.layout, layout.removesuffix("_text") if isinstance(layout, str) else layout
    yield "context", entry.context, text.get("max_position_embeddings", _MISSING)
    if entry.experts is not None:
        yield "experts.count", entry.experts.count, text.get("num_experts", _MISSING)
        yield "experts.active", entry.experts.active, text.get("num_experts_per_tok", _MISSING)
    shape = entry.shape
    if shape is None:
        return
    for name, theirs in _SIZES.items():
        found = text.get(theirs, whole.get(theirs, _MISSING))  # a VL model may say `tied` beside its text part
        yield f"shape.{name}", getattr(shape, name), found
    width = "intermediate_size" if entry.experts is None else "moe_intermediate_size"
    yield "shape.ffn", shape.ffn, text.get(width, _MISSING)
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        yield "shape.full_layers", shape.full_layers, sum(kind == "full_attention" for kind in kinds)
    if shape.linear is not None:
        for name, theirs in _LINEAR.items():
            yield f"shape.linear.{name}", getattr(shape.linear, name), text.get(theirs, _MISSING)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)
