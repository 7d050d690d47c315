"""What a user asks for (`RunConfig`) and what is then decided (`RunSpec`).

Owns every key of a run's TOML: its type, default, range and one sentence of documentation, each written
once. Validation, `--set`, hints, the JSON Schema and the reference page all derive from these classes.
It reads no file, asks no server and knows no recipe: `load.py` reads, `recipes.py` decides.

A validator's ValueError reads "rule; remedy"; `load.py` puts the key and the value in front of it.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from flash.config.environment_id import EnvironmentRef, parse_environment_id
from flash.config.secret_rules import (
    environment_name_fault,
    secret_name_fault,
    secret_value_fault,
    worker_value_fault,
)

Algorithm = Literal["sft", "grpo"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
LARGEST_INT = 1_000_000_000
RUN_ID = re.compile(r"flash-\d+-[0-9a-f]{8}")
ADAPTER_REF = re.compile(r"(?P<run_id>flash-\d+-[0-9a-f]{8})(?:/step-(?P<step>[1-9]\d*))?")


class FaultsError(ValueError):
    """Several things wrong with one value: (path below the key, "rule; remedy") of each."""

    def __init__(self, faults: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(rule for _, rule in faults))
        self.faults = faults


# --- how a value is read ------------------------------------------------------------------------------


def _whole(value: Any) -> int:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false, without quotes")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string; put it in quotes")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate can be stored neither in a file nor in the database
        raise ValueError("must be valid Unicode text") from None
    return value


def _label(value: Any) -> str:
    text = _text(value).strip()
    if not text:
        raise ValueError("must not be blank; write a name or leave the key out")
    return text


def _algorithm(value: Any) -> str:
    name = _text(value).strip().lower() or "sft"
    if name not in ALGORITHMS:
        raise ValueError('must be "sft" or "grpo"')
    return name


def _environment_id(value: Any) -> str:
    text = _text(value).strip()
    parse_environment_id(text)
    return text


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError('must be a list of strings; write ["a", "b"]')
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"must hold strings only, not {_kind(item)}; put each entry in quotes")
        _text(item)
    return tuple(value)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", dict: "a table", list: "a list"}
    return names.get(type(value), "another type")


def _each(items: tuple[str, ...], fault: Callable[[str], str | None]) -> tuple[str, ...]:
    """The items, or all that is wrong with any of them."""
    found = [rule for item in items if (rule := fault(item))]
    if found:
        raise FaultsError([((), rule) for rule in found])
    return items


def _requirements(value: Any) -> tuple[str, ...]:
    return _each(tuple(line.strip() for line in _strings(value)), _requirement_fault)


def _requirement_fault(line: str) -> str | None:
    if not line:
        return "holds an empty requirement; remove it"
    if line.startswith("-"):
        return f'holds {line!r:.60}, a pip option; list requirements only, such as "openai>=1.0"'
    if len(line.splitlines()) > 1:
        return "holds a requirement with a line break; write one requirement an entry"
    return (
        f"holds {secret}, which would be stored with the run; use an address without it"
        if (secret := secret_value_fault(line))
        else None
    )


def _secret_names(value: Any) -> tuple[str, ...]:
    return _each(tuple(dict.fromkeys(name.strip() for name in _strings(value))), secret_name_fault)


def _stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else _strings(value)
    return tuple(_text(text) for text in texts if text)


def _adapter_ref(value: Any) -> str:
    text = _text(value).strip()
    if not ADAPTER_REF.fullmatch(text):
        raise ValueError(
            "must be `<run-id>` or `<run-id>/step-N`; copy the run id from `flash status` "
            "or the short ref from `flash checkpoints`"
        )
    return text


def _params(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table; write [environment.params]")
    if faults := list(_param_faults((), value)):
        raise FaultsError(faults)
    return value


def _param_faults(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a value could not travel as JSON, or would put a secret into the run's spec."""
    if len(path) > 32:
        yield path[:3], "is nested more than 32 levels deep; flatten it"
    elif isinstance(value, dict):
        for key, inner in value.items():
            if fault := _raised(_text, key):
                yield path, f"has a key that {fault}"
            else:
                yield from _param_faults((*path, key), inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _param_faults((*path, str(number)), inner)
    elif fault := _param_fault(value):
        yield path, fault


def _param_fault(value: Any) -> str | None:
    if isinstance(value, str):
        if fault := _raised(_text, value):
            return fault
        secret = secret_value_fault(value)
        return secret and (
            f"looks like {secret}, and params become part of the run's spec; "
            "name it under environment.secrets and read it from os.environ"
        )
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        return _raised(_number, value)
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "must fit into 64 bits; write it as a string"
    return f"must be a JSON value, and a {type(value).__name__} is none; write it as a string"


def _raised(check: Callable[[Any], Any], value: Any) -> str | None:
    """What `check` has against a value, as text."""
    try:
        check(value)
    except ValueError as error:
        return str(error)
    return None


Positive = Annotated[int, Field(ge=1, le=LARGEST_INT), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=0, le=LARGEST_INT), BeforeValidator(_whole)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Label = Annotated[str, BeforeValidator(_label)]


class Section(BaseModel):
    # The docstrings below the fields are read by `reference.py` when it is asked: reading them here
    # (`use_attribute_docstrings`) would cost every start of the command 5 ms.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- what a user asks for -----------------------------------------------------------------------------


class EnvironmentSection(Section):
    """What the model is trained on: the environment, its arguments, its packages and its secrets."""

    id: Annotated[str, BeforeValidator(_environment_id)]
    """Published environment: `namespace/name`, pinned with `@<version>` if you like, or a GitHub reference
    (`github:owner/repo[@ref][:path]` or a https://github.com/ address), which is pinned to its commit."""

    params: Annotated[dict[str, Any], BeforeValidator(_params)] = Field(default_factory=dict)
    """Keyword arguments for the environment's `load_environment`. `split` also picks the packaged file
    `dataset/<split>.jsonl`, and `dataset_path` any other file. Part of the run's spec, so never a secret."""

    pip: Annotated[tuple[str, ...], BeforeValidator(_requirements)] = ()
    """Requirements to install, in the environment's own virtual environment, before its code is imported."""

    secrets: Annotated[tuple[str, ...], BeforeValidator(_secret_names)] = ()
    """Names of environment variables that the environment's code may read. Their values come from your shell,
    `.env.local` or `.env` when you submit."""

    @property
    def ref(self) -> EnvironmentRef:
        return parse_environment_id(self.id)


class TrainSection(Section):
    """How the adapter is trained. Every key is optional."""

    lora_rank: Positive = 32
    """Rank of the adapter: higher is larger, more capable and dearer. Each model has a cap, shown by
    `flash models`."""

    lora_alpha: Positive = 64
    """LoRA alpha: the adapter's output is scaled by alpha / rank."""

    learning_rate: Annotated[float, Field(gt=0), BeforeValidator(_number)] | None = None
    """Peak learning rate of the optimizer."""

    batch_size: Positive | None = None
    """SFT: examples in one optimizer step. GRPO: prompts in one step, each sampled `group_size` times."""

    max_length: Positive | None = None
    """Longest sequence in tokens: an SFT example, or a whole GRPO transcript with its prompt."""

    save_every: Positive | None = None
    """Steps between checkpoints. Each is uploaded; while one upload is under way the newest waiting save
    wins, and the last checkpoint is always kept."""

    init_from_adapter: Annotated[str, BeforeValidator(_adapter_ref)] | None = None
    """Start from an adapter of an earlier run: `<run-id>`, or `<run-id>/step-N` for one of its checkpoints.
    Its rank and alpha are used where this file leaves them out."""

    epochs: Positive | None = Field(default=None, json_schema_extra={"algorithm": "sft"})
    """Passes over the training rows."""

    max_steps: Count | None = Field(default=None, json_schema_extra={"algorithm": "sft"})
    """Stop after this many optimizer steps (0: no cap)."""

    max_examples: Count | None = Field(default=None, json_schema_extra={"algorithm": "sft"})
    """Use only the first rows of the dataset (0: all of them)."""

    steps: Positive | None = Field(default=None, json_schema_extra={"algorithm": "grpo"})
    """Training steps."""

    group_size: Positive | None = Field(default=None, json_schema_extra={"algorithm": "grpo"})
    """Completions sampled for each prompt; their mean reward is the baseline."""

    temperature: NonNegative | None = Field(default=None, json_schema_extra={"algorithm": "grpo"})
    """Sampling temperature of the rollouts."""

    max_tokens: Positive | None = Field(default=None, json_schema_extra={"algorithm": "grpo"})
    """Most tokens in one completion, reasoning included."""

    kl_penalty_coef: NonNegative | None = Field(default=None, json_schema_extra={"algorithm": "grpo"})
    """Weight of the penalty that holds the model near its base."""

    advantage_clip: NonNegative | None = Field(default=None, json_schema_extra={"algorithm": "grpo"})
    """Recorded with the run and without effect: the importance ratio is clipped, the advantage is not."""

    thinking_length_penalty_coef: Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)] | None = Field(
        default=None, json_schema_extra={"algorithm": "grpo"}
    )
    """Reward taken off for a reasoning trace that fills all of `max_tokens`; a shorter one loses in proportion."""

    stop_sequences: Annotated[tuple[str, ...], BeforeValidator(_stops)] | None = Field(
        default=None, json_schema_extra={"algorithm": "grpo"}
    )
    """Texts that end a completion. One string alone is one stop; empty ones are dropped."""


class WandbSection(Section):
    """Labels for Weights & Biases. Logging is on whenever `WANDB_API_KEY` is set where you submit."""

    project: Label | None = None
    """W&B project (otherwise `flash`)."""

    run_name: Label | None = None
    """W&B run name (otherwise the run id)."""


def _worker_value(value: Any) -> str:
    text = _text(value)
    if fault := worker_value_fault(text):
        raise ValueError(
            f"looks like {fault}, and worker_env is stored with the run; name it under environment.secrets instead"
        )
    return text


def _worker_name(value: Any) -> str:
    if fault := environment_name_fault(_text(value)):
        raise ValueError(fault)
    return str(value)


class RunConfig(Section):
    """A training run, as a TOML file describes it."""

    model: Label
    """Base model to train an adapter on; `flash models` lists them."""

    algorithm: Annotated[Algorithm, BeforeValidator(_algorithm)] = "sft"
    """`sft` imitates the example completions of your dataset; `grpo` learns from the reward that your
    environment computes."""

    thinking: Flag = False
    """Train with the model's reasoning mode on (models that can reason only). The trace shares `max_tokens`
    with the answer."""

    environment: EnvironmentSection

    train: TrainSection = TrainSection()

    worker_env: dict[Annotated[str, BeforeValidator(_worker_name)], Annotated[str, BeforeValidator(_worker_value)]] = (
        Field(default_factory=dict)
    )
    """Harmless labels and feature flags for the worker's environment variables. Stored with the run, so never
    a secret."""

    wandb: WandbSection | None = None

    def document(self) -> dict[str, Any]:
        """What the user wrote, as JSON-ready tables; they parse back to an equal config."""
        return self.model_dump(mode="json", exclude_unset=True)

    def given(self) -> frozenset[str]:
        """Dotted keys of `[train]` and the top level that the user set."""
        train = self.train
        keys = {f"train.{key}" for key in train.model_fields_set if getattr(train, key) is not None}
        return frozenset(keys | self.model_fields_set)


def keys_of(algorithm: Algorithm) -> frozenset[str]:
    """Names of `[train]` keys that only this algorithm reads."""
    return frozenset(
        name
        for name, field in TrainSection.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("algorithm") == algorithm
    )


def unwrapped(annotation: Any) -> Any:
    """A field's bare type: without Annotated and without `| None`."""
    while True:
        if hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, types.UnionType):
            annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
        else:
            return annotation


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or None for a plain value."""
    inner = unwrapped(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


# --- what is decided ----------------------------------------------------------------------------------


class Decided(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class EnvironmentSpec(Decided):
    id: str
    params: dict[str, Any]
    pip: tuple[str, ...]
    secrets: tuple[str, ...]

    @property
    def ref(self) -> EnvironmentRef:
        return parse_environment_id(self.id)


class TrainSpec(Decided):
    """Every key of `[train]`, filled; the keys of the other algorithm are None."""

    lora_rank: int
    lora_alpha: int
    learning_rate: float
    batch_size: int
    max_length: int
    save_every: int
    init_from_adapter: str | None = None
    # SFT
    epochs: int | None = None
    max_steps: int | None = None  # 0: no cap
    max_examples: int | None = None  # 0: no cap
    # GRPO
    steps: int | None = None
    group_size: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    kl_penalty_coef: float | None = None
    advantage_clip: float | None = None  # recorded, never read
    thinking_length_penalty_coef: float | None = None
    stop_sequences: tuple[str, ...] | None = None


class WandbSpec(Decided):
    project: str | None = None
    run_name: str | None = None


class Recipe(Decided):
    """What the algorithm needs and no key sets. Values and their sources: `recipes.py`."""

    optimizer: Literal["adamw"]
    lr_schedule: Literal["linear", "constant"]  # after warm-up; "linear" falls to zero at the last step
    warmup_ratio: float  # share of all optimizer steps
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    lora_dropout: float
    lora_targets: Literal["all-linear"]  # of the language model; never router, vision or head
    gpu_dtype: Literal["bfloat16"]
    cpu_dtype: Literal["float32"]
    micro_batch_tokens: int  # most tokens, padding included, in one forward pass
    # GRPO
    loss: Literal["dr_grpo"] | None = None  # token-level, constant normaliser, no std scaling
    top_p: float | None = None
    clip_epsilon: float | None = None
    importance_cap: float | None = None  # truncation of trainer/sampler ratios
    updates_per_batch: int | None = None


class RunSpec(Decided):
    """Everything decided: what workers and the database see, as JSON."""

    model: str
    algorithm: Algorithm
    thinking: bool
    seed: int
    environment: EnvironmentSpec
    train: TrainSpec
    worker_env: dict[str, str]
    wandb: WandbSpec | None
    recipe: Recipe
    defaulted: tuple[str, ...]  # dotted keys that the user left out
