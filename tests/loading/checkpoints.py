"""Tiny random checkpoints, named and split into files as the published ones are.

Qwen3.5 and Qwen3.6 are published as vision-language models with a multi-token-prediction layer: their language
model's weights are called `model.language_model.*`, and `model.visual.*` and `mtp.*` stand between them. MiniCPM5 is
a plain Llama with an output head of its own. The tokenizer is flash/nano's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from flash.catalog.catalog import PACKAGE_FOLDER

NANO = PACKAGE_FOLDER / "nano"
TEXT = {
    "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.2,
    "eos_token_id": 631, "bos_token_id": None, "pad_token_id": 631,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip

NAMES = ("Qwen/Qwen3.5-tiny", "Qwen/Qwen3.6-tiny-A1", "Qwen/Qwen3.6-tiny-A1-fused", "openbmb/MiniCPM5-tiny")


def save(name: str, folder: Path, *, shards: int = 3) -> Path:
    """One of `NAMES` as a repository's folder; also `nano`, flash/nano itself in one file."""
    if name == "nano":
        return Path(shutil.copytree(NANO, folder))
    torch.manual_seed(3)
    model = _model(name)
    model.save_pretrained(folder)
    tensors = _tensors(folder)
    if "Qwen" in name:
        tensors |= _prediction_layer(tensors)
    if name.endswith("fused"):
        tensors = _fused(tensors)
    _split(folder, tensors, shards)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / file, folder / file)
    # The published ones list every token that ends a turn here, and one alone in config.json.
    listed = {"eos_token_id": [633, 631], "pad_token_id": 631, "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(listed))
    (folder / "README.md").write_text("# A model card\n")
    return folder


def published(name: str, folder: Path) -> Any:
    """The model as its publisher's class reads it: for Qwen the vision-language one."""
    kind = {"Qwen3.5": Qwen3_5ForConditionalGeneration, "Qwen3.6": Qwen3_5MoeForConditionalGeneration}
    chosen: Any = next((found for part, found in kind.items() if part in name), LlamaForCausalLM)
    return chosen.from_pretrained(folder, attn_implementation="sdpa").eval()


def text_parameters(name: str) -> int:
    """Of the language model with its head: what a load should bring."""
    model = _model(name)
    body = model.model.language_model if "Qwen" in name else model.model
    head = 0 if model.config.get_text_config().tie_word_embeddings else model.lm_head.weight.numel()
    return sum(weight.numel() for weight in body.parameters()) + head


def _model(name: str) -> Any:
    if "MiniCPM5" in name:
        return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False, rope_theta=5e6))
    if "Qwen3.5" in name:
        text = {**TEXT, **DELTA, "tie_word_embeddings": True}
        return Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=True)
        )
    text = {**TEXT, **DELTA, **EXPERTS, "tie_word_embeddings": False}
    del text["intermediate_size"]
    return Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False)
    )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return found


def _prediction_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The multi-token-prediction layer: a full-attention layer behind a projection of two hidden states."""
    last = "model.language_model.layers.3."
    layer = {"mtp.layers.0." + name.removeprefix(last): each for name, each in tensors.items() if last in name}
    hidden = TEXT["hidden_size"]
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    found = {f"mtp.{name}.weight": torch.ones(hidden) for name in norms}
    found["mtp.fc.weight"] = torch.zeros(hidden, 2 * hidden)
    return found | {name: each.clone() for name, each in layer.items()}


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Routed experts as two tensors a layer, (experts, out, in): the other form in which they are published."""
    kept = {name: each for name, each in tensors.items() if ".experts." not in name}
    prefixes = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for prefix in prefixes:
        def of(part: str, prefix: str = prefix) -> torch.Tensor:
            every = range(EXPERTS["num_experts"])
            return torch.stack([tensors[f"{prefix}.experts.{expert}.{part}_proj.weight"] for expert in every])

        kept[f"{prefix}.experts.gate_up_proj"] = torch.cat([of("gate"), of("up")], dim=1)
        kept[f"{prefix}.experts.down_proj"] = of("down").contiguous()
    return kept


def _split(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """By turns, so that every file holds some of the language model and some of what is skipped."""
    names = sorted(tensors)
    places = {name: f"model-{at % shards + 1:05d}-of-{shards:05d}.safetensors" for at, name in enumerate(names)}
    for file in sorted(set(places.values())):
        held = {name: tensors[name].contiguous() for name in names if places[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    size = sum(each.numel() * each.element_size() for each in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
