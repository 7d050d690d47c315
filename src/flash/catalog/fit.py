"""How much memory a run needs, what fits it, and which key to lower when nothing does.

Owns the sum: weights, adapter, optimizer, gradients, and the larger of a training step and a rollout, which take
turns. Pure: a spec, a catalog entry and a device in, bytes out. `tests/catalog/test_fit.py` holds it to what small
models of each layout really keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from flash.catalog.catalog import ModelEntry
from flash.catalog.hardware import HardwareClass
from flash.catalog.shapes import adapted_weights, adapter_parameters, cache_bytes, kept_bytes, shape_of
from flash.config.run import RunSpec
from flash.errors import InvalidInput

Kind = Literal["gpu", "cpu"]

_WIDTH: dict[Kind, int] = {"gpu": 2, "cpu": 4}  # bytes of a number: bf16, fp32
# The interpreter with torch and transformers, and on a GPU the driver's context and the kernels' workspaces.
_RUNTIME: dict[Kind, int] = {"gpu": 1_200_000_000, "cpu": 500_000_000}
# What allocators hold beside what is asked of them: pieces of memory too small for the next request.
_SLACK: dict[Kind, float] = {"gpu": 0.08, "cpu": 0.03}
# Of a processor's memory, what a run may plan with: the system and other programs have the rest.
_SHARE: dict[Kind, float] = {"gpu": 1.0, "cpu": 0.8}
_LEAN_MOST = 500_000_000  # parameters up to which fp32 training copies adapted weights (training/forward.py)
_CHUNK_LOGITS = 1 << 24  # logits held at once (training/losses.py)
_PREFILL_TOKENS = 8192  # (inference/decoding.py)
_MOST_ROWS, _MOST_CACHED = 256, 1 << 18  # samples that decode at once, and their tokens (inference/torch_engine.py)
_SHORTEST = 64  # tokens: below it no max_length is worth naming


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, at `micro_batch_tokens` in one forward pass. `parts` add up to `total`, without `rollouts`
    or `training`, whichever is smaller."""

    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    head: int
    rollouts: int
    overhead: int
    micro_batch_tokens: int

    @property
    def training(self) -> int:
        """What a forward and backward pass holds beside weights and optimizer."""
        return self.activations + self.head

    @property
    def total(self) -> int:
        fixed = self.weights + self.adapter + self.optimizer + self.gradients + self.overhead
        return fixed + max(self.training, self.rollouts)

    @property
    def parts(self) -> dict[str, int]:
        names = ("weights", "adapter", "optimizer", "gradients", "activations", "head", "rollouts", "overhead")
        return {name: getattr(self, name) for name in names}


def least_tokens(spec: RunSpec) -> int:
    """Tokens of the smallest micro-batch: one row of full length."""
    return spec.train.max_length


def most_tokens(spec: RunSpec) -> int:
    """Tokens of the largest micro-batch that the recipe asks for and a batch can fill."""
    whole_batch = spec.train.batch_size * (spec.train.group_size or 1) * spec.train.max_length
    return max(spec.train.max_length, min(spec.recipe.micro_batch_tokens, whole_batch))


def memory_needed(spec: RunSpec, entry: ModelEntry, kind: Kind = "gpu", tokens: int | None = None) -> MemoryEstimate:
    """The peak, with micro-batches of `tokens` (padding included; by default the recipe's).

    bf16 weights on a GPU, fp32 on a CPU. Rows are taken to be as long as `max_length` allows. Raises ModelError
    for an entry without a shape.
    """
    shape = shape_of(entry)
    width = _WIDTH[kind]
    tokens = most_tokens(spec) if tokens is None else max(tokens, least_tokens(spec))
    trained = adapter_parameters(entry, spec.train.lora_rank)
    lean = kind == "cpu" and entry.layout in ("qwen3", "llama") and entry.params <= _LEAN_MOST
    activations = tokens * (kept_bytes(entry, rank=spec.train.lora_rank, width=width) + 2 * width * shape.hidden)
    activations += 4 * adapted_weights(entry) if lean else 0
    if kind == "gpu":  # the adapter's matrices in bf16
        activations += width * adapter_parameters(entry, spec.train.lora_rank, width=width)
    # one layer's gradients with respect to what it kept exist while it is passed through backwards
    layer_gradients = tokens * kept_bytes(entry, rank=0, width=width) // shape.layers
    # before that fp32 logits, which become their exponentials in place, on a GPU beside a copy in bf16
    logits = max(_CHUNK_LOGITS, shape.vocab) * (4 if kind == "cpu" else 6)
    activations += layer_gradients
    head = tokens * shape.hidden * 2 * width + max(0, logits - layer_gradients)  # the hidden states' slope stays
    rollouts = _rollout_bytes(spec, entry, width) if spec.algorithm == "grpo" else 0
    overhead = _RUNTIME[kind] + int(_SLACK[kind] * max(activations + head, rollouts))
    return MemoryEstimate(
        weights=width * entry.params,
        adapter=4 * trained,
        optimizer=8 * trained,  # AdamW's two moments
        gradients=4 * trained,
        activations=activations,
        head=head,
        rollouts=rollouts,
        overhead=overhead,
        micro_batch_tokens=tokens,
    )


def decoding_rows(spec: RunSpec) -> int:
    """Samples that decode together."""
    rows = spec.train.batch_size * (spec.train.group_size or 1)
    return max(1, min(rows, _MOST_ROWS, _MOST_CACHED // spec.train.max_length))


def _rollout_bytes(spec: RunSpec, entry: ModelEntry, width: int) -> int:
    """The cache of the rows that decode together, and the larger of a prefill and a step's logits."""
    shape = shape_of(entry)
    samples = min(_MOST_ROWS, spec.train.batch_size * (spec.train.group_size or 1))
    # not rows x max_length: with longer rows fewer decode at once, never less memory in all
    cached = min(samples * spec.train.max_length, max(_MOST_CACHED, spec.train.max_length))
    of_token, of_row = cache_bytes(entry, width)
    cache = cached * of_token + samples * of_row
    cache += cache // max(shape.full_layers, 1)  # a layer's cache grows by being copied
    prompts = min(max(_PREFILL_TOKENS, spec.train.max_length), spec.train.batch_size * spec.train.max_length)
    prefill = prompts * kept_bytes(entry, rank=0, width=width) // shape.layers
    logits = samples * shape.vocab * (width + 8)
    return cache + max(prefill, logits)


# --- does it fit? -----------------------------------------------------------------------------------------


def fits(spec: RunSpec, entry: ModelEntry, hardware: HardwareClass) -> bool:
    """Whether the run can be carried out there at all, if need be a row at a time."""
    return memory_needed(spec, entry, hardware.kind, least_tokens(spec)).total <= hardware.memory


def fitted(spec: RunSpec, entry: ModelEntry, hardware: HardwareClass) -> MemoryEstimate:
    """The estimate at the largest micro-batch that fits there comfortably, halved from the recipe's; else a row."""
    room = _SHARE[hardware.kind] * hardware.memory
    tokens = most_tokens(spec)
    while tokens > least_tokens(spec):
        found = memory_needed(spec, entry, hardware.kind, tokens)
        if found.total <= room:
            return found
        tokens = max(least_tokens(spec), tokens // 2)
    return memory_needed(spec, entry, hardware.kind, least_tokens(spec))


def choose(spec: RunSpec, entry: ModelEntry, classes: Iterable[HardwareClass]) -> HardwareClass:
    """The cheapest class, by the hour, that the run fits on; InvalidInput names the key to lower if there is none."""
    known = list(classes)
    fitting = [hardware for hardware in known if fits(spec, entry, hardware)]
    if not fitting:
        raise too_large(spec, entry, known)
    return min(fitting, key=lambda hardware: (hardware.usd_per_hour, -hardware.flops))


def too_large(spec: RunSpec, entry: ModelEntry, classes: Iterable[HardwareClass]) -> InvalidInput:
    """The refusal: need and have on the roomiest class, and the key whose lowering helps most simply."""
    roomiest = max(classes, key=lambda hardware: (hardware.memory, hardware.name))
    need = memory_needed(spec, entry, roomiest.kind, least_tokens(spec)).total
    key, remedy = _remedy(spec, entry, roomiest)
    value = f"{key} = {_value_of(spec, key)}: " if key != "model" else ""
    return InvalidInput(
        f"{value}{spec.algorithm} on {entry.id} needs {gigabytes(need)} of memory, and the roomiest hardware, "
        f"{roomiest.name}, has {gigabytes(roomiest.memory)}",
        remedy=remedy,
    )


def _remedy(spec: RunSpec, entry: ModelEntry, hardware: HardwareClass) -> tuple[str, str]:
    """The first key that makes it fit by itself, with the largest value that does; else the model."""
    for key, least in _keys(spec):
        most = _largest(spec, entry, hardware, key, least)
        if most is not None:
            return f"train.{key}", f"lower train.{key} to {most:,} or less".replace(",", "")
    smallest = memory_needed(_with(spec, max_length=_SHORTEST, group_size=1, batch_size=1), entry, hardware.kind)
    weights = gigabytes(smallest.weights)
    return "model", f"choose a smaller model: the weights of {entry.id} alone take {weights}; `flash models` lists them"


def _keys(spec: RunSpec) -> Iterator[tuple[str, int]]:
    """Keys that size a run, with the smallest value that makes sense."""
    yield "max_length", max(_SHORTEST, (spec.train.max_tokens or 0) + 1)
    if spec.algorithm == "grpo":
        yield "group_size", 2
    yield "batch_size", 1
    yield "lora_rank", 1


def _largest(spec: RunSpec, entry: ModelEntry, hardware: HardwareClass, key: str, least: int) -> int | None:
    """By bisection: need rises with each of these keys."""
    low, high = least, int(getattr(spec.train, key))
    if high <= low or not fits(_with(spec, **{key: low}), entry, hardware):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(_with(spec, **{key: middle}), entry, hardware):
            low = middle
        else:
            high = middle
    return low


def _with(spec: RunSpec, **train: int) -> RunSpec:
    known = {key: value for key, value in train.items() if getattr(spec.train, key) is not None}
    return spec.model_copy(update={"train": spec.train.model_copy(update=known)})


def _value_of(spec: RunSpec, key: str) -> object:
    return getattr(spec.train, key.removeprefix("train."))


def gigabytes(count: float) -> str:
    """For people, in units of 10^9 bytes: "0.6 GB", "74 GB"."""
    size = count / 1e9
    return f"{size:.1f} GB" if size < 10 else f"{size:,.0f} GB"
