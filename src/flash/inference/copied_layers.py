"""Layers of small fp32 models for decoding: copies of their weights with the adapter's update added.

Owns the copies, a layer's parts over them, and a decoded token's way through all layers as one scripted function.
"""
# ruff: noqa: UP045
# TorchScript reads the annotations themselves: no `from __future__ import annotations` here, and `Optional`.

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor

from flash.inference.scripting import scripted


class Norms:
    """A layer's norms, each as one operation."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._qk_weight: Tensor | None = None
        self._qk_epsilon = 0.0
        if hasattr(attention, "q_norm"):
            queries = attention.q_proj.out_features // attention.head_dim
            keys = attention.k_proj.out_features // attention.head_dim
            self._qk_weight = torch.stack([attention.q_norm.weight] * queries + [attention.k_norm.weight] * keys)
            self._qk_epsilon = attention.q_norm.variance_epsilon

    def attention_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._norms[0])

    def mlp_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._norms[1])

    def qk_norm(self, qk: Tensor, heads: int) -> Tensor:
        if self._qk_weight is None:
            return qk
        return F.rms_norm(qk, qk.shape[-1:], None, self._qk_epsilon) * self._qk_weight


class Weights(NamedTuple):
    """A layer's weights [out, in] with the worn adapter's update added; an empty tensor: the layer has none."""

    attention_norm: Tensor
    mlp_norm: Tensor
    epsilon: float
    qk_norm: Tensor  # [heads + kv heads, head dim]
    qk_epsilon: float
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Optional[Tensor]
    out_bias: Optional[Tensor]
    gate_up_bias: Optional[Tensor]
    down_bias: Optional[Tensor]


class CopiedLayer(Norms):
    """Small fp32 models: projections that share an input as one product, over copies of their weights with the
    adapter's update added. The base is never written to, and in fp32 adding costs no precision."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _stacked(attention.q_proj, attention.k_proj, attention.v_proj)
        out, out_bias = _stacked(attention.o_proj)
        gate_up, gate_up_bias = _stacked(mlp.gate_proj, mlp.up_proj)
        down, down_bias = _stacked(mlp.down_proj)
        norms = self._norms
        self.weights = Weights(
            attention_norm=norms[0].weight, mlp_norm=norms[1].weight, epsilon=norms[0].variance_epsilon,
            qk_norm=torch.empty(0) if self._qk_weight is None else self._qk_weight, qk_epsilon=self._qk_epsilon,
            qkv=qkv, out=out, gate_up=gate_up, down=down,
            qkv_bias=qkv_bias, out_bias=out_bias, gate_up_bias=gate_up_bias, down_bias=down_bias,
        )  # fmt: skip

    def qkv(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights.qkv, self.weights.qkv_bias)

    def out(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights.out, self.weights.out_bias)

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.weights.gate_up, self.weights.gate_up_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weights.down, self.weights.down_bias)


@scripted
def decode_step(
    x_B_H: Tensor,
    cos_B_1_D: Tensor,
    sin_B_1_D: Tensor,
    hidden_BK_1_T: Tensor,
    column: int,
    heads: int,
    scale: float,
    keys: list[Tensor],
    values: list[Tensor],
    layers: list[Weights],
    last_norm: Tensor,
    head_V_H: Tensor,
) -> Tensor:
    """`RowDecoder.step` from embeddings to logits: one token a row, filed at `column` of the caches."""
    B, H = x_B_H.shape
    K, D = keys[0].size(1), keys[0].size(3)
    half = D // 2
    x = x_B_H
    for number, layer in enumerate(layers):
        normed = F.rms_norm(x, [H], layer.attention_norm, layer.epsilon)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(B, -1, D)
        qk, v = qkv[:, : heads + K], qkv[:, heads + K :]
        if layer.qk_norm.numel() > 0:
            qk = F.rms_norm(qk, [D], None, layer.qk_epsilon) * layer.qk_norm
        turned = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
        qk = (qk * cos_B_1_D).addcmul_(turned, sin_B_1_D)
        keys[number][:B, :, column] = qk[:, heads:]
        values[number][:B, :, column] = v
        columns = keys[number].size(2)
        keys_BK_T_D = keys[number].view(-1, columns, D)[: B * K, : column + 1]
        values_BK_T_D = values[number].view(-1, columns, D)[: B * K, : column + 1]
        grouped = qk[:, :heads].reshape(B * K, -1, D)  # the queries that share a kv head
        scores = torch.baddbmm(hidden_BK_1_T, grouped, keys_BK_T_D.transpose(1, 2), alpha=scale)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values_BK_T_D)
        x = x + F.linear(attended.view(B, -1), layer.out, layer.out_bias)
        normed = F.rms_norm(x, [H], layer.mlp_norm, layer.epsilon)
        gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
    return F.linear(F.rms_norm(x, [H], last_norm, layers[0].epsilon), head_V_H)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


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
