"""Loads a base model and its tokenizer, ready to wear adapters.

Owns the device and dtype that weights land on, which tokens end a turn, and the refusal of models that only seem to
load. Runs no code from a model's repository and reads safetensors only. How files come to this machine is
`fetching`'s, what a folder must hold `model_files`'. Knows nothing of the catalog: a caller hands over a folder or an
id.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from flash.errors import ModelError, OutOfMemory
from flash.inference.fetching import Progress, locate
from flash.inference.lanes import ONE_LANE, Lanes
from flash.inference.lora import Adapters
from flash.inference.memory import first_line, is_out_of_memory
from flash.inference.model_files import check

transformers_logging.disable_progress_bar()

_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_LOADING_FAILS = (OSError, ValueError, KeyError, ImportError, AssertionError, SafetensorError)
_LAYER = re.compile(r"(model\.)?(language_model\.)?layers\.")


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
    lanes: Lanes = ONE_LANE  # how much of its work runs side by side

    @property
    def backbone(self) -> nn.Module:
        """The transformer without its head: token ids (B, T) -> hidden states (B, T, H)."""
        return self.model.base_model

    @property
    def head(self) -> Tensor:
        """The output embedding (V, H)."""
        return self.model.get_output_embeddings().weight

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say, special ones and odd spaces included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def best_device() -> str:
    """For callers that are given none; a launcher gives each attempt its own."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_for(device: torch.device) -> torch.dtype:
    """What a base is computed in there. Never fp16: it gives NaN gradients in Gated DeltaNet."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


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
    progress: Progress | None = None,
) -> BaseModel:
    """Loads a base from a folder (a Path, or an absolute one as text) or a Hugging Face id at `revision`.

    `name` is what adapters will call their base (default: the source as given). The dtype is bf16 on a
    GPU and fp32 on a CPU unless given. `progress` hears of a download. Raises ModelError (missing, gated, offline,
    damaged, not a causal language model, not safetensors), Unavailable (no network, a full disk) and OutOfMemory.
    """
    label = name or str(source)
    place = torch.device(device or best_device())
    kind = dtype or dtype_for(place)
    about = describe(source, name=name, revision=revision, progress=progress)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            about.folder,
            config=about.config,
            dtype=kind,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **_LOCAL,
        )
        model = model.to(place).eval()
    except (RuntimeError, MemoryError, *_LOADING_FAILS) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{label} does not fit into the memory of {place}: {first_line(error)}") from error
        if isinstance(error, _LOADING_FAILS):
            raise _explained(label, error) from error
        raise
    _check_report(label, report)
    return BaseModel(
        name=label,
        revision=about.revision,
        model=model,
        tokenizer=about.tokenizer,
        adapters=Adapters(model),
        stop_ids=about.stop_ids,
        pad_id=about.pad_id,
        context_length=about.context_length,
        device=place,
        dtype=kind,
    )


@dataclass(frozen=True)
class Description:
    """A model on this machine without its weights in memory; `folder` holds all of its files."""

    folder: Path
    revision: str | None
    config: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]  # all tokens that end a turn

    @property
    def pad_id(self) -> int:
        padding = self.tokenizer.pad_token_id
        return self.stop_ids[0] if padding is None else int(padding)

    @property
    def context_length(self) -> int:
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 2048))

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self.config.get_text_config().vocab_size)


def describe(
    source: str | Path, *, name: str | None = None, revision: str | None = None, progress: Progress | None = None
) -> Description:
    """Fetches a model where it must, checks its files, and reads the small ones; `load_base` without the weights.

    Raises as `load_base` does.
    """
    label = name or str(source)
    found = locate(source, revision=revision, label=label, progress=progress)
    if found.note is not None:
        logging.getLogger(__name__).warning("%s", found.note)
    check(found.folder, label)
    try:
        config = AutoConfig.from_pretrained(found.folder, **_LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(found.folder, **_LOCAL)
        _check_vocabulary(label, tokenizer, config)
        generation = None
        if (found.folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(found.folder, **_LOCAL)
    except _LOADING_FAILS as error:
        raise _explained(label, error) from error
    stop_ids = _stop_ids(tokenizer, config, generation)
    if not stop_ids:
        raise ModelError(f"{label}: neither its tokenizer nor its configuration names an end-of-text token")
    return Description(found.folder, found.commit or revision, config, tokenizer, stop_ids)


def _check_vocabulary(label: str, tokenizer: Any, config: Any) -> None:
    """The tokens of text and of the chat template must have a row in the embedding."""
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{label}: its tokenizer has no chat template", remedy="choose an instruction-tuned model"
        )
    try:
        greeting = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except TemplateError as error:
        raise ModelError(f"{label}: its chat template is broken: {error}") from None
    # Added tokens that no text leads to may lie beyond the embedding: Gemma 3's for images do in its text model.
    used = [tokenizer.vocab_size - 1, *tokenizer(greeting, add_special_tokens=False)["input_ids"]]
    largest = max([*used, *_stop_ids(tokenizer, config, None)])
    rows = int(config.get_text_config().vocab_size)
    if largest >= rows:
        raise ModelError(
            f"{label}: its tokenizer and its weights don't belong together: the tokenizer uses token {largest:,}, "
            f"and config.json gives the vocabulary {rows:,}",
            remedy="take both from the same checkpoint",
        )


def _check_report(label: str, report: dict[str, Any]) -> None:
    """Every weight of the language model must have found its place; a vision tower's and MTP's need none."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, given, expected = mismatched[0]
        raise ModelError(
            f"{label}: its weights have other sizes than config.json says: {name} is {list(given)}, not "
            f"{list(expected)}",
            remedy="take config.json and the weights from the same checkpoint",
        )
    if absent := sorted(report["missing_keys"]):  # they were filled with random numbers
        raise ModelError(
            f"{label}: its weights are incomplete: {absent[0]}{_more(absent)} missing",
            remedy="take config.json and the weights from the same checkpoint",
        )
    if left := sorted(filter(_LAYER.match, report["unexpected_keys"])):
        raise ModelError(
            f"{label}: config.json leaves out weights that are there: {left[0]}{_more(left)} unused",
            remedy="take config.json and the weights from the same checkpoint",
        )


def _more(names: list[str]) -> str:
    return " is" if len(names) == 1 else f" and {len(names) - 1} more are"


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
    """One line and a remedy for what transformers raises about a folder that looks whole."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    low = f"{type(error).__name__} {text}".lower()
    remedy: str | None
    if "trust_remote_code" in low or "custom code" in low:
        reason, remedy = "it needs code from its own repository, which Flash does not run", "choose another model"
    elif "unrecognized configuration class" in low or "model type" in low:
        reason, remedy = "it is not a causal language model that this version of transformers knows", (
            "choose another model, or update transformers"
        )
    else:
        reason, remedy = f"it can't be loaded: {first}", None
    logging.getLogger(__name__).debug("loading %s failed", label, exc_info=error)
    return ModelError(f"{label}: {reason}", remedy=remedy, detail=text or None)
