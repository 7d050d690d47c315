"""What a model's sizes imply: its parameters, its adapter's, and what a layer keeps of a token for backward.

Owns the arithmetic of the layouts, the same that transformers' classes and our LoRA layers follow. Pure; knows
no run and no hardware.

The bytes that a layer keeps were counted on these layouts in transformers 5.23 (every tensor that autograd saves,
by storage, weights left out), one size varied at a time: they are sums, linear in each size and in the tokens.
They hold for the layouts' own forwards, Gated DeltaNet by its reference implementation; its kernels keep less.
"""

from __future__ import annotations

from flash.catalog.catalog import LinearAttention, ModelEntry, Shape
from flash.errors import ModelError

LAYOUTS = ("qwen3", "llama", "qwen3_5", "qwen3_5_moe")
_GATED = ("qwen3_5", "qwen3_5_moe")


def shape_of(entry: ModelEntry) -> Shape:
    """The entry's sizes; a ModelError where estimates can't be made of it."""
    if entry.shape is None or entry.layout not in LAYOUTS:
        missing = "no shape" if entry.shape is None else f"the layout {entry.layout!r}"
        raise ModelError(
            f"{entry.id}: nothing can be estimated of a model with {missing} in its catalog entry",
            remedy="give its shape in models.toml; docs/models.md has the form",
        )
    if entry.shape.full_layers < entry.shape.layers and entry.shape.linear is None:
        raise ModelError(
            f"{entry.id}: nothing can be estimated without the sizes of its linear attention",
            remedy="give shape.linear in models.toml; docs/models.md has the form",
        )
    return entry.shape


def linear_layers(shape: Shape) -> int:
    return shape.layers - shape.full_layers


def _linear_widths(linear: LinearAttention) -> tuple[int, int]:
    """(keys, values): the widths of a Gated-DeltaNet layer's projections."""
    return linear.key_heads * linear.head_dim, linear.value_heads * linear.head_dim


def _full_linears(entry: ModelEntry, shape: Shape) -> list[tuple[int, int]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    gate = 2 if entry.layout in _GATED else 1  # the query projection also emits the output's gate
    return [(shape.hidden, gate * queries), (shape.hidden, keys), (shape.hidden, keys), (queries, shape.hidden)]


def _delta_linears(shape: Shape) -> list[tuple[int, int]]:
    if shape.linear is None:
        return []
    keys, values = _linear_widths(shape.linear)
    heads = shape.linear.value_heads
    outs = (2 * keys + values, values, heads, heads)
    return [*((shape.hidden, out) for out in outs), (values, shape.hidden)]


def _mlp_linears(entry: ModelEntry, shape: Shape) -> list[tuple[int, int]]:
    """The dense MLP, or the shared expert with its gate; routed experts are no linear layers."""
    dense = [(shape.hidden, shape.ffn), (shape.hidden, shape.ffn), (shape.ffn, shape.hidden)]
    return [*dense, (shape.hidden, 1)] if entry.experts else dense


def parameter_count(entry: ModelEntry) -> int:
    """Text parameters, multi-token prediction left out."""
    shape = shape_of(entry)
    full = sum(a * b for a, b in _full_linears(entry, shape)) + (0 if entry.layout == "llama" else 2 * shape.head_dim)
    every = sum(a * b for a, b in _mlp_linears(entry, shape)) + 2 * shape.hidden
    if entry.experts:
        every += shape.hidden * entry.experts.count + 3 * shape.hidden * shape.ffn * entry.experts.count
    delta = 0
    if shape.linear:
        keys, values = _linear_widths(shape.linear)
        extras = (2 * keys + values) * shape.linear.conv + 2 * shape.linear.value_heads + shape.linear.head_dim
        delta = sum(a * b for a, b in _delta_linears(shape)) + extras
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return embeddings + shape.hidden + shape.layers * every + shape.full_layers * full + linear_layers(shape) * delta


def body_parameters(entry: ModelEntry) -> int:
    """Parameters that work on each token between embedding and head."""
    shape = shape_of(entry)
    total = parameter_count(entry) - shape.vocab * shape.hidden * (1 if shape.tied else 2)
    if entry.experts:
        idle = max(0, entry.experts.count - entry.experts.active)
        total -= 3 * shape.hidden * shape.ffn * idle * shape.layers
    return total


def expert_rank(entry: ModelEntry, rank: int) -> int:
    """The rank of each routed expert's update (inference/lora.py); 0 where there are no experts."""
    return max(1, rank // entry.experts.active) if entry.experts else 0


def adapter_parameters(entry: ModelEntry, rank: int, *, width: int | None = None) -> int:
    """LoRA on every linear layer of the language model and on the routed experts.

    With `width`, the bytes of a number, as many as a pass computes with: it fills up the experts' rows.
    """
    shape = shape_of(entry)
    sides = [
        (shape.layers, _mlp_linears(entry, shape)),
        (shape.full_layers, _full_linears(entry, shape)),
        (linear_layers(shape), _delta_linears(shape)),
    ]
    dense = rank * sum(count * sum(a + b for a, b in linears) for count, linears in sides)
    return dense + _routed_parameters(entry, shape, _filled(expert_rank(entry, rank), width or 16))


def working_adapter_parameters(entry: ModelEntry, rank: int) -> int:
    """The adapter's parameters that work on each token: those of idle experts don't."""
    routed = _routed_parameters(entry, shape_of(entry), expert_rank(entry, rank))
    share = entry.experts.active / entry.experts.count if entry.experts else 0.0
    return adapter_parameters(entry, rank) - routed + int(share * routed)


def _routed_parameters(entry: ModelEntry, shape: Shape, rank: int) -> int:
    """Updates of gate and up together, and of down."""
    if entry.experts is None:
        return 0
    return shape.layers * entry.experts.count * rank * (shape.hidden + 2 * shape.ffn + shape.ffn + shape.hidden)


def _filled(rank: int, width: int) -> int:
    """The rank filled up to rows of whole 16 bytes (inference/lora.py)."""
    return rank + -rank % max(1, 16 // width)


def adapted_weights(entry: ModelEntry) -> int:
    """Parameters of the linear layers that wear the adapter."""
    shape = shape_of(entry)
    sides = [
        (shape.layers, _mlp_linears(entry, shape)),
        (shape.full_layers, _full_linears(entry, shape)),
        (linear_layers(shape), _delta_linears(shape)),
    ]
    return sum(count * sum(a * b for a, b in linears) for count, linears in sides)


def kept_bytes(entry: ModelEntry, *, rank: int, width: int) -> int:
    """Bytes that all layers keep of one token until backward; `width` is the dtype's, 2 or 4."""
    shape, small = shape_of(entry), width == 2
    fully = _kept_by_full(entry, shape, small) + 4 * width * rank
    delta = (_kept_by_delta(shape.linear, small) + 5 * width * rank) if shape.linear else 0
    return (
        shape.layers * (_kept_by_every(entry, shape, rank, width, small))
        + shape.full_layers * fully
        + linear_layers(shape) * delta
    )


def _kept_by_every(entry: ModelEntry, shape: Shape, rank: int, width: int, small: bool) -> int:
    """Both norms and the MLP. In bf16 the norms keep fp32."""
    kept = (12 if small else 16) * shape.hidden + (8 if small else 16) * shape.ffn + 8 + 3 * width * rank
    if entry.experts:
        filled = _filled(expert_rank(entry, rank), width) if rank else 0
        routed = width * (5 * shape.ffn + shape.hidden + 2 * filled) + 40
        kept += width * (shape.hidden + rank) + 4 * entry.experts.count + entry.experts.active * routed
    return kept


def _kept_by_full(entry: ModelEntry, shape: Shape, small: bool) -> int:
    """Bytes for each head: (a, b) stands for a * head_dim + b."""
    if entry.layout == "llama":
        queries, keys = ((4, 8), (4, 4)) if small else ((8, 4), (8, 0))
    elif entry.layout == "qwen3":
        queries, keys = ((8, 12), (8, 8)) if small else ((12, 8), (12, 4))
    else:
        queries, keys = ((14, 14), (8, 8)) if small else ((28, 8), (12, 4))
    of_queries = shape.heads * (queries[0] * shape.head_dim + queries[1])
    return of_queries + shape.kv_heads * (keys[0] * shape.head_dim + keys[1])


def _kept_by_delta(linear: LinearAttention, small: bool) -> int:
    """The chunked delta rule computes in fp32 whatever the dtype; 64 columns of its chunks count with the heads."""
    values, keys = (83, 8) if small else (107, 17)
    return linear.head_dim * (values * linear.value_heads + keys * linear.key_heads)


def cache_bytes(entry: ModelEntry, width: int) -> tuple[int, int]:
    """What decoding keeps: (for each token of a row, for each row)."""
    shape = shape_of(entry)
    of_token = shape.full_layers * 2 * shape.kv_heads * shape.head_dim * width
    if shape.linear is None:
        return of_token, 0
    keys, values = _linear_widths(shape.linear)
    state = 4 * shape.linear.value_heads * shape.linear.head_dim**2 + width * shape.linear.conv * (2 * keys + values)
    return of_token, linear_layers(shape) * state
