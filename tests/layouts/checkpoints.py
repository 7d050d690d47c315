"""Tiny random checkpoints of the catalog's layouts: true classes, weight names, tokens and chat manners.

Each is what a download would be: a folder with configuration, sharded safetensors, tokenizer and template. The
Qwen3.5 ones are vision-language checkpoints with a vision tower and a multi-token-prediction layer that a text run
must skip. Sizes are small and differ from each other, so that a mix-up of two of them shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from flash.catalog.catalog import PACKAGE_FOLDER, load_catalog

NANO = "flash/nano"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Layout:
    """One row of the table in docs/models.md. `models` are the catalog's entries of this layout."""

    name: str
    layout: str  # the catalog's word for it
    models: tuple[str, ...]
    template: str | None = None
    template_values: dict[str, str] = field(default_factory=dict)
    default_thinking: bool | str | None = False  # what the template does when it is not told

    @property
    def wrapped(self) -> bool:
        """Whether the checkpoint is a vision-language one around the text model."""
        return self.layout.startswith("qwen3_5")


QWEN3_5 = Layout(
    "Qwen3.5", "qwen3_5",
    ("Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B"),
    "qwen3_5.jinja", {"THINKS": "false", "JSON_VALUES": "false"},
)  # fmt: skip
MINICPM5 = Layout("MiniCPM5", "llama", ("openbmb/MiniCPM5-1B",), "minicpm5.jinja", default_thinking="model")
QWEN3_6 = Layout(
    "Qwen3.6 MoE", "qwen3_5_moe", ("Qwen/Qwen3.6-35B-A3B",),
    "qwen3_5.jinja", {"THINKS": "true", "JSON_VALUES": "true"}, default_thinking=True,
)  # fmt: skip
LAYOUTS = {
    layout.name: layout for layout in (Layout("flash/nano", "qwen3", (NANO,)), QWEN3_5, MINICPM5, QWEN3_6)
}


def save_checkpoint(layout: Layout, folder: Path) -> Path:
    """Writes the layout's checkpoint into `folder` and returns where it is; flash/nano is the shipped one."""
    if layout.name == NANO:
        return PACKAGE_FOLDER / "nano"
    torch.manual_seed(0)
    tokenizer = _tokenizer(layout)
    tokenizer.save_pretrained(folder)
    vocab = 32 * -(-len(tokenizer) // 32) + 32  # as in the real ones, the head knows more ids than the tokenizer
    ends = [tokenizer.convert_tokens_to_ids(token) for token in _ends(layout)]
    model = _llama(vocab, ends) if layout.layout == "llama" else _wrapped(layout, vocab, ends)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder, max_shard_size="100KB")
    if layout.wrapped:
        _add_prediction_layer(folder)
    return folder


def _ends(layout: Layout) -> list[str]:
    return ["</s>", "<|im_end|>"] if layout.layout == "llama" else ["<|im_end|>", "<|endoftext|>"]


_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _llama(vocab: int, ends: list[int]) -> Any:
    """Queries wider than the hidden state, and an untied head, as in MiniCPM5."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False,
        rope_parameters=_ROPE, initializer_range=0.1, eos_token_id=ends, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _wrapped(layout: Layout, vocab: int, ends: list[int]) -> Any:
    sparse = layout.layout.endswith("moe")
    text: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 40 if sparse else 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "tie_word_embeddings": not sparse,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "initializer_range": 0.1, "eos_token_id": ends[-1],
        "rope_parameters": {
            **_ROPE, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True,
        },
    }  # fmt: skip
    if sparse:
        text |= {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
        }  # fmt: skip
    else:
        text["intermediate_size"] = 64
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": text["hidden_size"], "num_position_embeddings": 16,
    }  # fmt: skip
    classes = (
        (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration) if sparse
        else (Qwen3_5Config, Qwen3_5ForConditionalGeneration)
    )  # fmt: skip
    config = classes[0](text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])
    return classes[1](config)


def _add_prediction_layer(folder: Path) -> None:
    """A multi-token-prediction layer as the checkpoints carry it: transformers' classes have none."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    source = folder / index["weight_map"]["model.language_model.norm.weight"]
    hidden = len(load_file(source)["model.language_model.norm.weight"])
    extra = {
        "mtp.fc.weight": torch.randn(hidden, 2 * hidden), "mtp.norm.weight": torch.zeros(hidden),
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(2 * hidden, hidden),
    }  # fmt: skip
    save_file(extra, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, "model-mtp.safetensors")
    index_path.write_text(json.dumps(index))


# --- tokenizers -------------------------------------------------------------------------------------------------


def _tokenizer(layout: Layout) -> PreTrainedTokenizerFast:
    """Byte-level, with merges across line breaks; think and tool tokens are single and not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    merges = [("Ċ", "Ċ"), ("i", "n"), ("e", "r"), ("Ġ", "a")]
    vocab |= {first + second: len(vocab) + number for number, (first, second) in enumerate(merges)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    runs = Regex(r"\s*[\r\n]+|[^\s]+|\s+(?!\S)|\s+")  # line breaks stay together, whatever follows them
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(runs, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    plain = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if layout.layout == "llama":
        fast = _finished(inner, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", bos="<s>", pad=None)
    else:
        marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks]
        fast = _finished(inner, names, eos="<|im_end|>", bos=None, pad="<|endoftext|>")
    assert layout.template is not None
    text = (TEMPLATES / layout.template).read_text(encoding="utf-8")
    for name, value in layout.template_values.items():
        text = text.replace(name, value)
    fast.chat_template = text
    return fast


def _finished(
    inner: Tokenizer, specials: Sequence[str], *, eos: str, bos: str | None, pad: str | None
) -> PreTrainedTokenizerFast:
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if bos is not None:  # put before every text, unless asked not to: the template has printed it already
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos, pad_token=pad)


def catalog_names() -> set[str]:
    """Every model that ships; the layouts' `models` must be all of them."""
    return {entry.id for entry in load_catalog(Path("/nowhere"))}
