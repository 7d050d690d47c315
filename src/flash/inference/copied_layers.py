"""Layers of small fp32 models for decoding: copies of their weights with the adapter's update added.

Owns the copies, and the way of prompts and of a decoded token through all layers, each as one scripted function.
"""
# ruff: noqa: UP045
# TorchScript reads the annotations themselves: no `from __future__ import annotations` here, and `Optional`.

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor

from flash.inference.scripting import scripted


class Weights(NamedTuple):
    """A layer's weights [out, in] with the worn adapter's update added, and the norms before them multiplied in."""

    epsilon: Tensor  # [1, 1], the norms' own times what they are the mean of: see `_unit`
    qk_norm: Optional[Tensor]  # [heads + kv heads, head dim]
    qk_epsilon: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Optional[Tensor]
    out_bias: Optional[Tensor]
    gate_up_bias: Optional[Tensor]
    down_bias: Optional[Tensor]


def copied(layer: Any) -> Weights:
    """A layer's weights as it wears its adapter now. The base is never written to, and in fp32 adding costs no
    precision."""
    attention, mlp = layer.self_attn, layer.mlp
    qk_norm, qk_epsilon = stacked_qk_norm(attention)
    qkv, qkv_bias = _stacked(attention.q_proj, attention.k_proj, attention.v_proj)
    out, out_bias = _stacked(attention.o_proj)
    gate_up, gate_up_bias = _stacked(mlp.gate_proj, mlp.up_proj)
    down, down_bias = _stacked(mlp.down_proj)
    size, width = qkv.shape[1], attention.head_dim
    return Weights(
        epsilon=qkv.new_full((1, 1), layer.input_layernorm.variance_epsilon * size),
        qk_norm=None if qk_norm is None else qk_norm * width**0.5,
        qk_epsilon=qkv.new_full((1, 1), qk_epsilon * width),
        qkv=qkv.mul_(layer.input_layernorm.weight * size**0.5), out=out,
        gate_up=gate_up.mul_(layer.post_attention_layernorm.weight * size**0.5), down=down,
        qkv_bias=qkv_bias, out_bias=out_bias, gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip


def stacked_qk_norm(attention: Any) -> tuple[Tensor | None, float]:
    """The weights [heads + kv heads, head dim] of the norms of queries and keys, if the layout has any, and epsilon."""
    if not hasattr(attention, "q_norm"):
        return None, 0.0
    queries = attention.q_proj.out_features // attention.head_dim
    keys = attention.k_proj.out_features // attention.head_dim
    weights = [attention.q_norm.weight.detach()] * queries + [attention.k_norm.weight.detach()] * keys
    return torch.stack(weights), attention.q_norm.variance_epsilon


def copied_head(model: Any) -> Tensor:
    """The output layer's weight [V, H], the last norm multiplied in."""
    weight: Tensor = model.lm_head.weight
    return weight * (model.model.norm.weight * weight.shape[1] ** 0.5)


@scripted
def _unit(x: Tensor, epsilon: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + epsilon) over the last dimension: an RMSNorm over n numbers whose weight and sqrt(n) are in
    what comes next, with n times its epsilon."""
    length = torch.linalg.vector_norm(x, dim=[-1], keepdim=True)
    return x * torch.addcmul(epsilon, length, length).rsqrt_()


@scripted
def _heads_of(
    layer: Weights, x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [..., heads, head dim], normed where the layout says so, and rotated by [..., 1, D]."""
    D = cos.size(-1)
    half = D // 2
    qkv = F.linear(_unit(x, layer.epsilon), layer.qkv, layer.qkv_bias).unflatten(-1, [-1, D])
    qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
    qk_norm = layer.qk_norm
    if qk_norm is not None:
        qk = _unit(qk, layer.qk_epsilon).mul_(qk_norm)
    turned = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
    q, k = (qk * cos).addcmul_(turned, sin).split([heads, kv_heads], dim=-2)
    return q, k, v


@scripted
def _after_attention(layer: Weights, x: Tensor, attended: Tensor) -> Tensor:
    """What leaves the layer."""
    x = x + F.linear(attended, layer.out, layer.out_bias)
    gate, up = F.linear(_unit(x, layer.epsilon), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)


@scripted
def prefill(
    x_P_T_H: Tensor,
    cos_T_1_D: Tensor,
    sin_T_1_D: Tensor,
    heads: int,
    rows_N: Tensor,
    source_N: Tensor,
    place_N_T: Tensor,
    first_column: int,
    last_P: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    layers: list[Weights],
    head_V_H: Tensor,
) -> Tensor:
    """`RowDecoder._prefill` from embeddings to logits [P, V] at `last_P`: row `rows_N[i]` gets the keys and values of
    prompt `source_N[i]` at `place_N_T[i]`, from `first_column` on."""
    P, T = x_P_T_H.shape[:2]
    K = keys[0].size(1)
    x = x_P_T_H
    for number, layer in enumerate(layers):
        q, k, v = _heads_of(layer, x, cos_T_1_D, sin_T_1_D, heads, K)
        keys[number][rows_N, :, first_column : first_column + T] = k[source_N[:, None], place_N_T].transpose(1, 2)
        values[number][rows_N, :, first_column : first_column + T] = v[source_N[:, None], place_N_T].transpose(1, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if heads > K:
            k, v = k.repeat_interleave(heads // K, dim=1), v.repeat_interleave(heads // K, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = _after_attention(layer, x, attended.transpose(1, 2).reshape(P, T, -1))
    ended_P_H = x[torch.arange(P, device=x.device), last_P]
    return F.linear(_unit(ended_P_H, layers[0].epsilon), head_V_H)


@scripted
def decode_step(
    x_B_H: Tensor,
    starts_B: Tensor,
    hidden_BK_1_C: Tensor,
    column: int,
    cos_T_1_D: Tensor,
    sin_T_1_D: Tensor,
    heads: int,
    scale: float,
    keys: list[Tensor],
    values: list[Tensor],
    layers: list[Weights],
    head_V_H: Tensor,
) -> Tensor:
    """`RowDecoder.step` from embeddings to logits: one token a row, filed at `column` of the caches. cos and sin are of
    all positions, what is hidden of all columns."""
    B = x_B_H.size(0)
    K, D = keys[0].size(1), keys[0].size(3)
    positions_B = column - starts_B
    cos_B_1_D, sin_B_1_D = cos_T_1_D.index_select(0, positions_B), sin_T_1_D.index_select(0, positions_B)
    hidden_BK_1_T = hidden_BK_1_C[:, :, : column + 1]
    x = x_B_H
    for number, layer in enumerate(layers):
        q, k, v = _heads_of(layer, x, cos_B_1_D, sin_B_1_D, heads, K)
        keys[number][:B, :, column] = k
        values[number][:B, :, column] = v
        columns = keys[number].size(2)
        keys_BK_T_D = keys[number].view(-1, columns, D)[: B * K, : column + 1]
        values_BK_T_D = values[number].view(-1, columns, D)[: B * K, : column + 1]
        grouped = q.reshape(B * K, -1, D)  # the queries that share a kv head
        scores = torch.baddbmm(hidden_BK_1_T, grouped, keys_BK_T_D.transpose(1, 2), alpha=scale)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values_BK_T_D)
        x = _after_attention(layer, x, attended.view(B, -1))
    return F.linear(_unit(x, layers[0].epsilon), head_V_H)


def _stacked(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of linears that share an input, stacked along the output, the worn adapter's update added."""
    weights = []
    for linear in linears:
        pair = getattr(linear, "pair", None)
        weights.append(
            linear.weight if pair is None else torch.addmm(linear.weight, pair.B, pair.A, alpha=pair.scaling)
        )
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None
