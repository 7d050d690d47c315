"""What a model folder must hold, told from names, small files and the headers of the weights.

Owns which files a load needs, and every fault that can be seen before gigabytes are read: no weights, a shard that
is missing or cut short, an adapter or a quantised model in a base model's place. Knows no hub, no torch and no
transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flash.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SMALL_ENDINGS = (".json", ".jinja", ".txt", ".model")  # configuration, tokenizer, chat template
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
# Endings of an architecture's name that say "predicts the next token". A VL model's text half is trained.
_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def is_small(name: str) -> bool:
    """Whether a repository's file is one of those beside the weights that loading may read."""
    is_index = name.endswith(".index.json") and name != INDEX
    return "/" not in name and name.endswith(_SMALL_ENDINGS) and not is_index


def is_safe(name: str) -> bool:
    """Whether a name that someone else chose stays inside the folder it is put into."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\\" not in name and not {"..", "."} & set(parts)


def shards_of(index: bytes) -> tuple[str, ...]:
    """The files that an index spreads the weights over. Raises ValueError for what is no index."""
    document = json.loads(index)
    weights = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ValueError("it has no weight_map")
    names = sorted({str(name) for name in weights.values()})
    if not all(is_safe(name) and name.endswith(".safetensors") for name in names):
        raise ValueError("it names files that are no safetensors")
    return tuple(names)


def refusal(names: Collection[str]) -> tuple[str, str] | None:
    """Why a folder or repository with files of these names is no base model (reason, remedy); None if it may be."""
    if CONFIG not in names:
        if "adapter_config.json" in names:
            return "it is an adapter, not a base model", "name the model that it was trained on"
        return f"it has no {CONFIG}: it is no model in transformers' form", "check the id or the folder"
    if INDEX in names or WEIGHTS in names:
        return None
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")))
    found = f" (it has {others[0]})" if others else ""
    return f"it has no safetensors weights{found}", "choose a model that is published as safetensors"


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that hold the weights, whether they are there or not; one whole file goes first, as
    transformers has it. ValueError: the index is none."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.is_file():
        return (WEIGHTS,)
    return shards_of(index.read_bytes())


def is_complete(folder: Path) -> bool:
    """Whether a load from this folder finds all that it needs; a weight file that was cut short does not count."""
    try:
        names = weight_files(folder)
    except (OSError, ValueError):
        return False
    return (folder / CONFIG).is_file() and all(damage(folder / name) is None for name in names)


def damage(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and its length; None when nothing is.

    Bytes that were changed inside the weights can't be seen so.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_HEADER):
                return "it is cut short, or no safetensors file"
            header = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError, OverflowError, struct.error, AttributeError, LookupError, TypeError):
        return "it is cut short, or no safetensors file"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"it is {size:,} bytes long, and its header speaks of {whole:,}"


def check(folder: Path, label: str) -> None:
    """Raises a ModelError that names the fault and the file when the folder is no whole base model."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"{label}: {folder} can't be read: {error.strerror}") from None
    if (refused := refusal(names)) is not None:
        raise ModelError(f"{label}: {refused[0]}", remedy=refused[1])
    config = _config(folder, label)
    _check_kind(config, label)
    try:
        weights = weight_files(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{label}: {INDEX} can't be read: {error}", remedy=_remedy(folder / INDEX)) from None
    for name in weights:
        if (fault := damage(folder / name)) is not None:
            raise ModelError(f"{label}: {name} is damaged: {fault}", remedy=_remedy(folder / name))


def _config(folder: Path, label: str) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{label}: {CONFIG} can't be read: {error}", remedy=_remedy(folder / CONFIG)) from None
    if not isinstance(config, dict):
        raise ModelError(f"{label}: {CONFIG} can't be read: it is no JSON object", remedy=_remedy(folder / CONFIG))
    return config


def _check_kind(config: Mapping[str, Any], label: str) -> None:
    """By the architecture that it names; one without a name is left to transformers."""
    listed = config.get("architectures")
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else []
    if kinds and not any(kind.endswith(_LANGUAGE_MODELS) for kind in kinds):
        raise ModelError(
            f"{label}: it is a {kinds[0]}, not a causal language model", remedy="choose a chat model"
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{label}: its weights are quantised ({method or 'by a method it does not name'})",
            remedy="choose the checkpoint in bf16 that it was made from",
        )


def _remedy(path: Path) -> str:
    """For a file that should be another one: in a cache of the hub's it is fetched again once it is gone."""
    if path.is_symlink():
        return f"delete {path.resolve()}: the next run fetches it again"
    return f"copy {path} again from where it came"
