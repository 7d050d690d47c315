"""A leaner forward pass for small fp32 models of the Qwen3 and Llama layouts.

It computes what the model's own forward computes, at less work for training: the last layer's output
projection and MLP run on trained positions only; positions that several rows share are computed once;
projections that share an input are one matrix product;
and each projection uses a *copy* of its weight with the adapter's update added, made anew for every pass
(the base itself is never written to). Adding in fp32 costs no precision worth naming; bf16 would, so bf16
bases keep their own forward. `lean_forward` returns None wherever the result would not be the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor

from flash.inference.loading import BaseModel
from flash.inference.lora import LoraLinear
from flash.inference.scripting import scripted
from flash.training.batches import Sharing

_MAX_PARAMETERS = 500_000_000  # the copies take as much memory as the adapted weights
_TOLERANCE = 1e-4


class Forward(Protocol):
    def __call__(self, tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        """Hidden states (N, H), after the last norm, at flat positions into B*T; right-padded rows.

        `sharing` may be made use of: it changes the work, never the result.
        """


def model_forward(base: BaseModel) -> Forward:
    """The model's own forward, whatever its layout."""

    def forward(tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        hidden_B_T_H = base.backbone(input_ids=tokens_B_T, use_cache=False).last_hidden_state
        return hidden_B_T_H.reshape(-1, hidden_B_T_H.shape[-1])[positions_N]

    return forward


def lone_rows_forward(base: BaseModel) -> Forward:
    """The model's own forward on one row at a time: slow, and right where rows of a batch would mix."""

    def forward(tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        rows = [base.backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in tokens_B_T]
        return torch.cat(rows)[positions_N]

    return forward


def lean_forward(base: BaseModel) -> LeanForward | None:
    """The lean forward, if the layout is known and its numbers agree with the model's own here."""
    config = base.model.config
    if config.model_type not in ("qwen3", "llama") or config.hidden_act != "silu" or base.dtype != torch.float32:
        return None
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return None
    if sum(weight.numel() for weight in base.model.parameters()) > _MAX_PARAMETERS:
        return None
    lean = LeanForward(base.backbone)
    return lean if _agrees(lean, model_forward(base), base) else None


@torch.no_grad()
def _agrees(lean: Forward, own: Forward, base: BaseModel) -> bool:
    vocabulary = base.head.shape[0]
    tokens = torch.arange(3, 3 + 2 * 24, device=base.device).mul_(7).remainder_(vocabulary).view(2, 24)
    positions = torch.tensor([0, 5, 23, 30, 47], device=base.device)
    ours, theirs = lean(tokens, positions), own(tokens, positions)
    return bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max().clamp(min=1.0))


class LeanForward:
    """`bare`: as if the model wore no adapter, whatever it wears."""

    def __init__(self, backbone: Any, *, bare: bool = False) -> None:
        self._backbone = backbone
        self._bare = bare

    def without_adapter(self) -> LeanForward:
        return LeanForward(self._backbone, bare=True)

    def __call__(self, tokens_B_T: Tensor, positions_N: Tensor, sharing: Sharing | None = None) -> Tensor:
        backbone = self._backbone
        rows, length = tokens_B_T.shape
        places = torch.arange(length, device=tokens_B_T.device)
        cos_1_T_D, sin_1_T_D = backbone.rotary_emb(backbone.embed_tokens.weight[:1, :1], places[None])
        rotation = cos_1_T_D[0, :, None], sin_1_T_D[0, :, None]
        tokens, needed_N = tokens_B_T.view(-1), positions_N
        if sharing is not None:
            tokens, needed_N = tokens[sharing.computed_U], sharing.place_BT[positions_N]
            rotation = rotation[0][sharing.computed_U % length], rotation[1][sharing.computed_U % length]
        hidden = backbone.embed_tokens(tokens)
        last = backbone.layers[-1]
        every_U, last_N = _places(positions_N, needed_N, sharing)
        for layer in backbone.layers:
            normed = _norm(layer.input_layernorm, hidden)
            mixed = self._attention(layer.self_attn, normed, rows, length, rotation, sharing)
            if layer is last:
                mixed, hidden = mixed.index_select(0, last_N), hidden.index_select(0, needed_N)
            elif every_U is not None:
                mixed = mixed.index_select(0, every_U)
            hidden = hidden + self._project([layer.self_attn.o_proj], mixed)
            hidden = hidden + self._mlp(layer.mlp, _norm(layer.post_attention_layernorm, hidden))
        return _norm(backbone.norm, hidden)

    def _attention(
        self,
        attention: Any,
        x: Tensor,
        rows: int,
        length: int,
        rotation: tuple[Tensor, Tensor],
        sharing: Sharing | None,
    ) -> Tensor:
        """Causal attention of right-padded rows, before the output projection: (B*T, heads*D).

        `x` (U, H) holds the computed positions: all B*T of them without sharing. Where attention is split, the result
        holds the openings' positions and then the rows' own: (P*S + B*C, heads*D).
        """
        width = attention.head_dim
        shape = (rows, length) if sharing is None else (len(x),)
        projected = self._project([attention.q_proj, attention.k_proj, attention.v_proj], x).view(*shape, -1, width)
        queries = attention.q_proj.out_features // width
        keys = attention.k_proj.out_features // width
        both, value = projected.split([queries + keys, keys], dim=-2)
        if hasattr(attention, "q_norm"):
            weights = [attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)]
            both = _RMSNorm.apply(both, torch.cat(weights), attention.q_norm.variance_epsilon)
        query, key = _Rotate.apply(both, *rotation).split([queries, keys], dim=-2)

        def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                attn_mask=hidden, is_causal=hidden is None, scale=attention.scaling, enable_gqa=queries != keys,
            )
            return mixed.transpose(1, 2).reshape(-1, queries * width)

        if sharing is None:
            return attend(query, key, value)
        # every row gets its own view of what it shares
        all_keys, all_values = (_rows_of(part, sharing.place_BT.view(rows, length)) for part in (key, value))
        if sharing.split is None:
            return attend(_rows_of(query, sharing.place_BT.view(rows, length)), all_keys, all_values)
        split = sharing.split
        opened = attend(*(_rows_of(part, split.openings_P_S) for part in (query, key, value)))
        own = attend(_rows_of(query, split.own_B_C), all_keys, all_values, split.hidden_B_1_C_T)
        return torch.cat([opened, own])

    def _mlp(self, mlp: Any, x: Tensor) -> Tensor:
        gated: Tensor = _SwiGLU.apply(self._project([mlp.gate_proj, mlp.up_proj], x))
        return self._project([mlp.down_proj], gated)

    def _project(self, layers: Sequence[LoraLinear], x: Tensor) -> Tensor:
        """Several projections of one input (N, in), side by side: (N, sum of outs)."""
        pairs = [] if self._bare else [layer.pair for layer in layers if layer.pair is not None]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if not pairs:  # the bare base
            return F.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None)
        if len(pairs) < len(layers):  # an adapter that leaves some of these layers out
            return torch.cat([layer(x) for layer in layers], dim=-1)
        factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
        result: Tensor = _AdaptedLinear.apply(
            x,
            [layer.weight for layer in layers],
            torch.cat(biases) if biases else None,
            [pair.scaling for pair in pairs],
            *factors,
        )
        return result


def _places(positions_N: Tensor, needed_N: Tensor, sharing: Sharing | None) -> tuple[Tensor | None, Tensor]:
    """Where in what `_attention` returns the computed positions stand (None: they are all of it), and those that are
    needed in the end."""
    if sharing is None:
        return None, positions_N
    if sharing.split is None:
        return sharing.computed_U, positions_N
    return sharing.split.place_U, sharing.split.place_U[needed_N]


def _rows_of(parts_U: Tensor, place_B_T: Tensor) -> Tensor:
    """(U, heads, D) laid out as (B, T, heads, D)."""
    return parts_U.index_select(0, place_B_T.reshape(-1)).view(*place_B_T.shape, *parts_U.shape[1:])


def _norm(norm: Any, x: Tensor) -> Tensor:
    result: Tensor = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return result


class _AdaptedLinear(torch.autograd.Function):
    """x @ (W + scaling * B A)^T + bias for projections stacked along the output; gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x_N_I: Tensor, weights: list[Tensor], bias: Tensor | None, scalings: list[float], *factors: Tensor
    ) -> Tensor:
        out_N_O, adapted_O_I = _adapted(x_N_I, weights, bias, scalings, list(factors[0::2]), list(factors[1::2]))
        ctx.save_for_backward(x_N_I, adapted_O_I, *factors)
        ctx.scalings = scalings
        return out_N_O

    @staticmethod
    def backward(ctx: Any, grad_N_O: Tensor) -> tuple[Tensor | None, ...]:
        x_N_I, adapted_O_I, *factors = ctx.saved_tensors
        of_factors = _adapted_backward(grad_N_O, x_N_I, factors[0::2], factors[1::2], ctx.scalings)
        grad_x = grad_N_O @ adapted_O_I if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, *of_factors


@scripted
def _adapted(
    x_N_I: Tensor,
    weights: list[Tensor],
    bias: Optional[Tensor],  # noqa: UP045  (what TorchScript can read)
    scalings: list[float],
    As: list[Tensor],
    Bs: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The outputs, and the weights with their updates added."""
    adapted_O_I = x_N_I.new_empty([sum([B.size(0) for B in Bs]), x_N_I.size(-1)])
    out = 0
    for i in range(len(Bs)):
        part = adapted_O_I[out : out + Bs[i].size(0)]
        torch.addmm(weights[i], Bs[i], As[i], alpha=scalings[i], out=part)
        out += Bs[i].size(0)
    return F.linear(x_N_I, adapted_O_I, bias), adapted_O_I


@scripted
def _adapted_backward(
    grad_N_O: Tensor, x_N_I: Tensor, As: list[Tensor], Bs: list[Tensor], scalings: list[float]
) -> list[Tensor]:
    """Gradients of A, B, A, B, ..."""
    found: list[Tensor] = []
    of_factors = 2 * sum([A.numel() for A in As]) + 2 * sum([B.numel() for B in Bs])  # products a token
    if grad_N_O.size(-1) * x_N_I.size(-1) <= of_factors:
        # for wide adapters the whole weight's gradient is less work, and those of its factors follow from it
        of_weights = (grad_N_O.t() @ x_N_I).split([B.size(0) for B in Bs])
        for i in range(len(As)):
            found.append((Bs[i].t() @ of_weights[i]).mul_(scalings[i]))
            found.append((of_weights[i] @ As[i].t()).mul_(scalings[i]))
        return found
    low_N_R = x_N_I @ torch.cat(As).t()
    grad_low_N_R = torch.empty_like(low_N_R)
    of_Bs: list[Tensor] = []
    out, rank = 0, 0
    for i in range(len(As)):
        grad = grad_N_O[:, out : out + Bs[i].size(0)]
        of_Bs.append((grad.t() @ low_N_R[:, rank : rank + As[i].size(0)]).mul_(scalings[i]))
        torch.mm(grad, Bs[i] * scalings[i], out=grad_low_N_R[:, rank : rank + As[i].size(0)])
        out += Bs[i].size(0)
        rank += As[i].size(0)
    of_As = (grad_low_N_R.t() @ x_N_I).split([A.size(0) for A in As])
    for i in range(len(As)):
        found.append(of_As[i])
        found.append(of_Bs[i])
    return found


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of gate and up side by side: (N, 2 * F) -> (N, F)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gated, silu = _gated(gate_up)
        ctx.save_for_backward(gate_up, silu)
        return gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gated_backward(grad, *ctx.saved_tensors)


@scripted
def _gated(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and silu(gate)."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    return silu * up, silu


@scripted
def _gated_backward(grad: Tensor, gate_up: Tensor, silu: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    of_both = torch.empty_like(gate_up)
    of_gate, of_up = of_both.chunk(2, dim=-1)
    torch.ops.aten.silu_backward(grad * up, gate, grad_input=of_gate)
    torch.mul(silu, grad, out=of_up)
    return of_both


class _RMSNorm(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * w over the last dimension, with a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _normed_backward(grad, *ctx.saved_tensors), None, None


@scripted
def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse = torch.linalg.vector_norm(x, dim=[-1], keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (x * inverse).mul_(weight), inverse


@scripted
def _normed_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    weighted = grad * weight
    shared = (weighted * x).sum(dim=-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.size(-1))
    return weighted.mul_(inverse).addcmul_(x, shared)


class _Rotate(torch.autograd.Function):
    """Rotary embedding of (B, T, heads, D) by cos and sin (T, 1, D); its transpose is the turn back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


@scripted
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
