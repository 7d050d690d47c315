"""Loads a base model and its tokenizer, ready to wear adapters.

Owns where weights come from (a folder or a Hugging Face id), the device and dtype they land on, and which
tokens end a turn. Runs no code from a model's repository and reads safetensors only. Knows nothing of
the catalog: a caller hands over a folder or an id.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from flash.errors import ModelError, OutOfMemory
from flash.inference.lora import Adapters

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class BaseModel:
    """A frozen base with its tokenizer and adapters.

    `model` is transformers' causal LM in eval mode; `stop_ids` are all tokens that end a turn.
    """

    name: str
    revision: str | None
    model: Any
    tokenizer: Any
    adapters: Adapters
    stop_ids: tuple[int, ...]
    pad_id: int
    context_length: int
    device: torch.device
    dtype: torch.dtype

    @property
    def backbone(self) -> nn.Module:
        """The transformer without its head: token ids (B, T) -> hidden states (B, T, H)."""
        return self.model.base_model

    @property
    def head(self) -> Tensor:
        """The output embedding (V, H)."""
        return self.model.get_output_embeddings().weight


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def load_checked(source: str | Path, *, device: str, **options: Any) -> tuple[BaseModel, str | None]:
    """`load_base`, but on an Apple GPU only where its numbers are the CPU's; else on the CPU, and why."""
    if device != "mps":
        return load_base(source, device=device, **options), None
    reason = "this build of torch can't use it"
    if torch.backends.mps.is_available():
        base = load_base(source, device=device, **options)
        gap = gap_to_cpu(base)
        if gap <= (1e-3 if base.dtype == torch.float32 else 0.1):
            return base, None
        reason = f"its log-probabilities differ from the CPU's by {gap:.2g}"
    return load_base(source, device="cpu", **options), f"the Apple GPU is not used: {reason}"


@torch.no_grad()
def gap_to_cpu(base: BaseModel) -> float:
    """How far the bare base's log-probabilities are from those of an fp32 copy on the CPU, at worst."""
    vocabulary = base.head.shape[0]
    tokens = torch.tensor([[(7 * place + 3) % vocabulary for place in range(16)]])
    with base.adapters.active(None):
        here = base.model(input_ids=tokens.to(base.device), use_cache=False).logits.float().log_softmax(-1).cpu()
        there = copy.deepcopy(base.model).to("cpu", torch.float32)(input_ids=tokens, use_cache=False)
    gap = (here - there.logits.log_softmax(-1)).abs().max().item()
    return gap if gap == gap else float("inf")


def load_base(
    source: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> BaseModel:
    """Loads a base from a local folder or a Hugging Face id at `revision`.

    `name` is what adapters will call their base (default: the source as given). The dtype is bf16 on a
    GPU and fp32 on a CPU unless given. Raises ModelError (missing, gated, offline, not a causal language
    model, not safetensors) and OutOfMemory.
    """
    label = name or str(source)
    place = torch.device(device or best_device())
    kind = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    where = str(source)
    if Path(where).is_absolute() and not Path(where).is_dir():
        raise ModelError(f"{label}: there is no model folder at {where}")
    common: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": False,
        "token": os.environ.get("HF_TOKEN"),
    }
    try:
        config = AutoConfig.from_pretrained(where, **common)
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=kind,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            **common,
        )
        model = model.to(place).eval()
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{label} does not fit into the memory of {place}: {error}") from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _explained(label, error) from error
    if absent := sorted(report["missing_keys"]):  # they were filled with random numbers
        raise ModelError(f"{label}: its weights are incomplete: {absent[0]} and {len(absent) - 1} more are missing")
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{label}: its tokenizer has no chat template", remedy="choose an instruction-tuned model"
        )
    stop_ids = _stop_ids(tokenizer, config, getattr(model, "generation_config", None))
    if not stop_ids:
        raise ModelError(f"{label}: neither its tokenizer nor its configuration names an end-of-text token")
    pad_id = tokenizer.pad_token_id
    text_config = config.get_text_config()
    return BaseModel(
        name=label,
        revision=revision or getattr(config, "_commit_hash", None),
        model=model,
        tokenizer=tokenizer,
        adapters=Adapters(model),
        stop_ids=stop_ids,
        pad_id=stop_ids[0] if pad_id is None else int(pad_id),
        context_length=int(getattr(text_config, "max_position_embeddings", 2048)),
        device=place,
        dtype=kind,
    )


def _stop_ids(tokenizer: Any, config: Any, generation: GenerationConfig | None) -> tuple[int, ...]:
    """The tokenizer's end token first, then every one that the model's own files list.

    All of them, because checkpoints disagree: a tokenizer may end a turn with a token that the
    configuration leaves out, and the other way round.
    """
    ids: list[int] = []
    for value in (
        tokenizer.eos_token_id,
        getattr(generation, "eos_token_id", None),
        getattr(config.get_text_config(), "eos_token_id", None),
    ):
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and int(token) not in ids:
                ids.append(int(token))
    return tuple(ids)


def _explained(label: str, error: Exception) -> ModelError:
    """One line and a remedy for what transformers and the hub raise."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    low = f"{type(error).__name__} {text}".lower()
    if "gated" in low or "401" in low or "403" in low:
        reason, remedy = "access is gated", "accept its licence on its page and set HF_TOKEN"
    elif "safetensors" in low and ("no file" in low or "not have" in low or "not appear" in low):
        reason, remedy = "it has no safetensors weights", "choose a model that is published as safetensors"
    elif "trust_remote_code" in low or "custom code" in low:
        reason, remedy = "it needs code from its own repository, which Flash does not run", (
            "choose another model"
        )
    elif "connect" in low or "offline" in low or "resolve" in low or "internet" in low:
        reason, remedy = "it is not on this machine and the model hub can't be reached", (
            "check the network, or add a local copy to models.toml"
        )
    elif "not a local folder" in low or "not a valid model identifier" in low or "404" in low:
        reason, remedy = "no such model", "check the id with `flash models`"
    elif "unrecognized configuration class" in low or "model type" in low:
        reason, remedy = "it is not a causal language model that this version of transformers knows", (
            "choose another model, or update transformers"
        )
    else:
        reason, remedy = f"it can't be loaded: {first}", None
    logging.getLogger(__name__).debug("loading %s failed", label, exc_info=error)
    return ModelError(f"{label}: {reason}", remedy=remedy, detail=text or None)
