"""One layer of the Qwen3 and Llama layouts for training in fp32, in two steps: up to attention and after it.

Each step is one scripted function forward and one backward, its gradients written out: to a small model what the
interpreter does between two operations costs as much as they do, and lanes wait for each other there. Owns the
arithmetic of a layer and of its adapters' gradients; knows nothing of rows, padding or what positions share.
"""
# ruff: noqa: UP045
# TorchScript reads the annotations themselves: no `from __future__ import annotations` here, and `Optional`.

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor

from flash.inference.scripting import scripted


class Projection(NamedTuple):
    """Linear layers of one input, their outputs side by side, and the factors of the adapter's updates.

    Each pass uses a copy of the weights with the updates added: in fp32 adding costs no precision worth naming, and
    the base itself is never written to. A layer without an update has factors of rank 0.
    """

    weights: list[Tensor]  # [out, in]
    bias: Optional[Tensor]  # [sum of outs]
    scalings: list[float]
    As: list[Tensor]  # [rank, in]
    Bs: list[Tensor]  # [out, rank]


def projection(*linears: Any, bare: bool) -> Projection:
    """`bare`: as if they wore no adapter, whatever they wear."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    pairs = [None if bare else linear.pair for linear in linears]
    weights = [linear.weight for linear in linears]
    return Projection(
        weights,
        torch.cat(biases) if biases else None,
        [0.0 if pair is None else pair.scaling for pair in pairs],
        [W.new_empty(0, W.shape[1]) if pair is None else pair.A for W, pair in zip(weights, pairs, strict=True)],
        [W.new_empty(W.shape[0], 0) if pair is None else pair.B for W, pair in zip(weights, pairs, strict=True)],
    )


def before_attention(
    layer: Any, x_N_H: Tensor, cos: Tensor, sin: Tensor, shape: list[int], *, bare: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [*shape, heads, head dim]: normed where the layout says so, queries and keys rotated
    by cos and sin, which broadcast to [*shape, 1, head dim]. `shape` holds N positions."""
    attention, norm = layer.self_attn, layer.input_layernorm
    width = attention.head_dim
    queries = attention.q_proj.out_features // width
    keys = attention.k_proj.out_features // width
    qk_norm, qk_epsilon = None, 0.0
    if hasattr(attention, "q_norm"):
        weights = [attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)]
        qk_norm, qk_epsilon = torch.cat(weights), attention.q_norm.variance_epsilon
    qkv = projection(attention.q_proj, attention.k_proj, attention.v_proj, bare=bare)
    both, value = _BeforeAttention.apply(
        x_N_H, norm.weight, norm.variance_epsilon, qkv, qk_norm, qk_epsilon, cos, sin, [*shape, -1, width],
        queries + keys, *qkv.As, *qkv.Bs,
    )  # fmt: skip
    query, key = both.split([queries, keys], dim=-2)
    return query, key, value


def after_attention(layer: Any, x_N_H: Tensor, attended_N_I: Tensor, *, bare: bool = False) -> Tensor:
    """What leaves the layer at N positions, given what entered it and what attention found there."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    out = projection(layer.self_attn.o_proj, bare=bare)
    gate_up = projection(mlp.gate_proj, mlp.up_proj, bare=bare)
    down = projection(mlp.down_proj, bare=bare)
    result: Tensor = _AfterAttention.apply(
        x_N_H, attended_N_I, norm.weight, norm.variance_epsilon, out, gate_up, down,
        *out.As, *out.Bs, *gate_up.As, *gate_up.Bs, *down.As, *down.Bs,
    )  # fmt: skip
    return result


def last_norm(norm: Any, x: Tensor) -> Tensor:
    result: Tensor = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return result


# --- the parts --------------------------------------------------------------------------------------------------


@scripted
def _projected(x_N_I: Tensor, layers: Projection) -> tuple[Tensor, Tensor]:
    """The outputs (N, sum of outs), and the weights with their updates added."""
    adapted_O_I = x_N_I.new_empty([sum([B.size(0) for B in layers.Bs]), x_N_I.size(-1)])
    out = 0
    for i in range(len(layers.Bs)):
        part = adapted_O_I[out : out + layers.Bs[i].size(0)]
        torch.addmm(layers.weights[i], layers.Bs[i], layers.As[i], alpha=layers.scalings[i], out=part)
        out += layers.Bs[i].size(0)
    return F.linear(x_N_I, adapted_O_I, layers.bias), adapted_O_I


@scripted
def _of_factors(
    grad_N_O: Tensor, x_N_I: Tensor, As: list[Tensor], Bs: list[Tensor], scalings: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of As and Bs."""
    of_As: list[Tensor] = []
    of_Bs: list[Tensor] = []
    of_factors = 2 * sum([A.numel() for A in As]) + 2 * sum([B.numel() for B in Bs])  # products a token
    if grad_N_O.size(-1) * x_N_I.size(-1) <= of_factors:
        # for wide adapters the whole weight's gradient is less work, and those of its factors follow from it
        of_weights = (grad_N_O.t() @ x_N_I).split([B.size(0) for B in Bs])
        for i in range(len(As)):
            of_As.append((Bs[i].t() @ of_weights[i]).mul_(scalings[i]))
            of_Bs.append((of_weights[i] @ As[i].t()).mul_(scalings[i]))
        return of_As, of_Bs
    low_N_R = x_N_I @ torch.cat(As).t()
    grad_low_N_R = torch.empty_like(low_N_R)
    out, rank = 0, 0
    for i in range(len(As)):
        grad = grad_N_O[:, out : out + Bs[i].size(0)]
        of_Bs.append((grad.t() @ low_N_R[:, rank : rank + As[i].size(0)]).mul_(scalings[i]))
        torch.mm(grad, Bs[i] * scalings[i], out=grad_low_N_R[:, rank : rank + As[i].size(0)])
        out += Bs[i].size(0)
        rank += As[i].size(0)
    for part in (grad_low_N_R.t() @ x_N_I).split([A.size(0) for A in As]):
        of_As.append(part)
    return of_As, of_Bs


def _by_projection(factors: list[Tensor], scalings: list[list[float]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Each projection's As, and its Bs: as many of them as it has scalings."""
    rest = iter(factors)
    As: list[list[Tensor]] = []
    Bs: list[list[Tensor]] = []
    for own in scalings:
        As.append([next(rest) for _ in own])
        Bs.append([next(rest) for _ in own])
    return As, Bs


@scripted
def _gated(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of gate and up side by side, (N, 2 * F) -> (N, F); and silu(gate)."""
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


@scripted
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., heads, D] by cos and sin [..., 1, D]; the transpose is the turn back, by -sin."""
    half = x.size(-1) // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


# --- up to attention --------------------------------------------------------------------------------------------


class _BeforeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, epsilon: float, qkv: Projection, qk_norm: Tensor | None,
        qk_epsilon: float, cos: Tensor, sin: Tensor, shape: list[int], rotated: int, *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        both, value, kept = _before(x, norm, epsilon, qkv, qk_norm, qk_epsilon, cos, sin, shape, rotated)
        ctx.save_for_backward(x, norm, qk_norm, cos, sin, *kept, *factors)
        ctx.scalings = qkv.scalings
        return both, value

    @staticmethod
    def backward(ctx: Any, grad_both: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, qk_norm, cos, sin, *rest = ctx.saved_tensors
        kept, factors = rest[:5], rest[5:]
        [As], [Bs] = _by_projection(factors, [ctx.scalings])
        grad_x, of_factors = _before_backward(
            grad_both, grad_value, x, norm, qk_norm, cos, sin, kept, As, Bs, ctx.scalings, ctx.needs_input_grad[0]
        )
        return grad_x, *[None] * 9, *of_factors


@scripted
def _before(
    x: Tensor, norm: Tensor, epsilon: float, qkv: Projection, qk_norm: Optional[Tensor], qk_epsilon: float,
    cos: Tensor, sin: Tensor, shape: list[int], rotated: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Queries and keys, values, and what backward needs."""
    normed, inverse = _normed(x, norm, epsilon)
    heads, adapted = _projected(normed, qkv)
    heads = heads.view(shape)
    both, value = heads[..., :rotated, :], heads[..., rotated:, :]
    raw, qk_inverse = inverse, inverse
    if qk_norm is not None:
        raw = both
        both, qk_inverse = _normed(raw, qk_norm, qk_epsilon)
    return _rotated(both, cos, sin), value.contiguous(), [normed, inverse, adapted, raw, qk_inverse]


@scripted
def _before_backward(
    grad_both: Tensor, grad_value: Tensor, x: Tensor, norm: Tensor, qk_norm: Optional[Tensor], cos: Tensor,
    sin: Tensor, kept: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float], wants_x: bool,
) -> tuple[Optional[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients of x, and of the factors: the As, then the Bs."""
    normed, inverse, adapted, raw, qk_inverse = kept[0], kept[1], kept[2], kept[3], kept[4]
    grad_both = _rotated(grad_both, cos, -sin)
    if qk_norm is not None:
        grad_both = _normed_backward(grad_both, raw, qk_norm, qk_inverse)
    grad_qkv = torch.cat((grad_both, grad_value), dim=-2).view(x.size(0), -1)
    of_As, of_Bs = _of_factors(grad_qkv, normed, As, Bs, scalings)
    grad_x: Optional[Tensor] = None
    if wants_x:
        grad_x = _normed_backward(grad_qkv @ adapted, x, norm, inverse)
    return grad_x, of_As + of_Bs


# --- after attention --------------------------------------------------------------------------------------------


class _AfterAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, norm: Tensor, epsilon: float, out: Projection, gate_up: Projection,
        down: Projection, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        result, kept = _after(x, attended, norm, epsilon, out, gate_up, down)
        ctx.save_for_backward(attended, norm, *kept, *factors)
        ctx.scalings = [out.scalings, gate_up.scalings, down.scalings]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, norm, *rest = ctx.saved_tensors
        kept, factors = rest[:9], rest[9:]
        As, Bs = _by_projection(factors, ctx.scalings)
        grad_x, grad_attended, of_factors = _after_backward(grad, attended, norm, kept, As, Bs, ctx.scalings)
        return grad_x, grad_attended, *[None] * 5, *of_factors


@scripted
def _after(
    x: Tensor, attended: Tensor, norm: Tensor, epsilon: float, out: Projection, gate_up: Projection, down: Projection
) -> tuple[Tensor, list[Tensor]]:
    """The result, and what backward needs."""
    middle, out_weight = _projected(attended, out)
    middle.add_(x)
    normed, inverse = _normed(middle, norm, epsilon)
    both, gate_up_weight = _projected(normed, gate_up)
    gated, silu = _gated(both)
    result, down_weight = _projected(gated, down)
    kept = [middle, normed, inverse, both, silu, gated, out_weight, gate_up_weight, down_weight]
    return result.add_(middle), kept


@scripted
def _after_backward(
    grad: Tensor, attended: Tensor, norm: Tensor, kept: list[Tensor], As: list[list[Tensor]],
    Bs: list[list[Tensor]], scalings: list[list[float]],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of x, of what attention found, and of the factors: of each projection the As, then the Bs."""
    middle, normed, inverse, both, silu, gated = kept[0], kept[1], kept[2], kept[3], kept[4], kept[5]
    down_As, down_Bs = _of_factors(grad, gated, As[2], Bs[2], scalings[2])
    grad_both = _gated_backward(grad @ kept[8], both, silu)
    gate_up_As, gate_up_Bs = _of_factors(grad_both, normed, As[1], Bs[1], scalings[1])
    grad_x = _normed_backward(grad_both @ kept[7], middle, norm, inverse).add_(grad)
    out_As, out_Bs = _of_factors(grad_x, attended, As[0], Bs[0], scalings[0])
    return grad_x, grad_x @ kept[6], out_As + out_Bs + gate_up_As + gate_up_Bs + down_As + down_Bs
