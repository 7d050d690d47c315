"""Adapter folders in the form that vLLM takes: layer names and ranks.

Our files name the layers as PEFT finds them on the text model: `model.layers…`. Of a vision-language checkpoint
vLLM builds the whole model, finds no layer of that name in it, and serves the bare base without a word
(vllm-project/vllm#48019). There it is given a copy under the checkpoint's own names; a vLLM that is told to build the
text model alone understands those too. Knows no processes and no HTTP.
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flash.catalog.deploying import VLLM_RANKS
from flash.errors import InvalidInput, ModelError
from flash.inference.lora import CONFIG_FILE, WEIGHTS_FILE

_TEXT, _WRAPPED = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


def room_for(rank: int) -> int:
    """The smallest of vLLM's ranks that holds adapters of this one; InvalidInput where none does."""
    room = next((known for known in VLLM_RANKS if known >= rank), None)
    if room is None:
        raise InvalidInput(f"rank {rank}: vLLM takes adapters up to rank {VLLM_RANKS[-1]}")
    return room


def is_wrapped(model: Path) -> bool:
    """Whether the checkpoint in this folder holds its text model inside another one."""
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{model / 'config.json'} can't be read: {error}") from error
    return isinstance(config.get("text_config"), dict)


def served_form(folder: Path, model: Path, copies: Path) -> Path:
    """The adapter folder itself, or a renamed copy of it below `copies`, to be removed by the caller.

    Raises ModelError when the weights can't be read.
    """
    if not is_wrapped(model):
        return folder
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} can't be read: {error}") from error
    copy = copies / secrets.token_hex(8)
    copy.mkdir(parents=True)
    shutil.copyfile(folder / CONFIG_FILE, copy / CONFIG_FILE)
    renamed = {
        _WRAPPED + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, copy / WEIGHTS_FILE, metadata={"format": "pt"})
    return copy
