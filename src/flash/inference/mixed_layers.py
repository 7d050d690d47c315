"""The way of tokens through all layers of Qwen3- and Llama-layout models, each under its own adapter, as two scripted
functions: one token of every row, and runs of prompts.

Owns the base's weights as those functions read them. Knows neither rows that come and go nor who owns the cache.
"""
# ruff: noqa: UP045
# TorchScript reads the annotations themselves: no `from __future__ import annotations` here, and `Optional`.

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor

from flash.inference.adapter_updates import Part, Run, add_parts, add_runs
from flash.inference.copied_layers import stacked_qk_norm
from flash.inference.scripting import scripted

# a layer's sites: linear layers that share an input
SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class BaseLayer(NamedTuple):
    """One layer's own weights [out, in], by site."""

    attention_norm: Tensor
    mlp_norm: Tensor
    epsilon: float
    qk_norm: Optional[Tensor]  # [heads + kv heads, head dim]
    qk_epsilon: float
    weights: list[list[Tensor]]  # one for each of a site's layers, or all of them stacked
    biases: list[Optional[Tensor]]  # stacked


def base_layer(layer: Any, stacked: bool) -> BaseLayer:
    """`stacked`: projections that share an input become one product, over a copy of their weights."""
    weights: list[list[Tensor]] = []
    biases: list[Tensor | None] = []
    for names in SITES:
        linears = [layer.get_submodule(name) for name in names]
        found = [linear.weight.detach() for linear in linears]
        weights.append([torch.cat(found)] if stacked and len(found) > 1 else found)
        own = [linear.bias.detach() for linear in linears if linear.bias is not None]
        biases.append(torch.cat(own) if own else None)
    qk_norm, qk_epsilon = stacked_qk_norm(layer.self_attn)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return BaseLayer(
        norms[0].weight.detach(), norms[1].weight.detach(), norms[0].variance_epsilon, qk_norm, qk_epsilon,
        weights, biases,
    )  # fmt: skip


@scripted
def _projected(
    layer: BaseLayer, number: int, site: int, x: Tensor, parts: list[Part], runs: list[Run]
) -> Tensor:
    """The outputs of a site's layers side by side, with the adapters of its rows: `parts` or `runs` has them."""
    weights, bias = layer.weights[site], layer.biases[site]
    if len(weights) == 1:
        out = F.linear(x, weights[0], bias)
    else:
        out = torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
        if bias is not None:
            out = out.add_(bias)
    add_parts(parts, out, x, 4 * number + site)
    add_runs(runs, out, x, 4 * number + site)
    return out


@scripted
def _queries(layer: BaseLayer, number: int, x: Tensor, parts: list[Part], runs: list[Run]) -> Tensor:
    """Queries, keys and values side by side."""
    normed = F.rms_norm(x, [x.size(1)], layer.attention_norm, layer.epsilon)
    return _projected(layer, number, 0, normed, parts, runs)


@scripted
def _after_attention(
    layer: BaseLayer, number: int, x: Tensor, attended: Tensor, parts: list[Part], runs: list[Run]
) -> Tensor:
    """What leaves the layer."""
    x = x + _projected(layer, number, 1, attended, parts, runs)
    normed = F.rms_norm(x, [x.size(1)], layer.mlp_norm, layer.epsilon)
    gate, up = _projected(layer, number, 2, normed, parts, runs).chunk(2, dim=-1)
    return x + _projected(layer, number, 3, F.silu(gate).mul_(up), parts, runs)


@scripted
def _heads_of(
    layer: BaseLayer, qkv: Tensor, cos_N_1_D: Tensor, sin_N_1_D: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [N, heads, head dim], normed where the layout says so, and rotated."""
    D = cos_N_1_D.size(-1)
    half = D // 2
    split = qkv.view(qkv.size(0), -1, D)
    kv_heads = (split.size(1) - heads) // 2
    qk, v = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
    qk_norm = layer.qk_norm
    if qk_norm is not None:
        qk = F.rms_norm(qk, [D], None, layer.qk_epsilon) * qk_norm
    turned = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
    qk = (qk * cos_N_1_D).addcmul_(turned, sin_N_1_D)
    return qk[:, :heads], qk[:, heads:], v


@scripted
def _attend_rows(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """One token a row: q [rows * kv heads, queries, d] over keys and values [rows * kv heads, T, d]."""
    scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=q.size(-1) ** -0.5)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), values)


@scripted
def step_rows(
    x_B_H: Tensor,
    cos_B_1_D: Tensor,
    sin_B_1_D: Tensor,
    heads: int,
    kv: Tensor,
    place_BK: Tensor,
    bias_BK_1_T: Tensor,
    long_rows: list[int],
    reaches: list[int],
    layers: list[BaseLayer],
    parts: list[Part],
) -> Tensor:
    """Hidden states [B, H] after all layers, of a token a row.

    `kv` [layers, 2, rows, kv heads, columns, d] gets the tokens' keys and values at `place_BK`, flat places into rows,
    heads and columns. Rows attend to `bias`'s T columns; each of `long_rows` to as many as its entry in `reaches`.
    """
    B, K, columns, D = x_B_H.size(0), kv.size(3), kv.size(4), kv.size(5)
    common = bias_BK_1_T.size(2)
    runs: list[Run] = []
    x = x_B_H
    for i, layer in enumerate(layers):
        qkv = _queries(layer, i, x, parts, runs)
        q, k, v = _heads_of(layer, qkv, cos_B_1_D, sin_B_1_D, heads)
        keys, values = kv[i, 0], kv[i, 1]
        keys.view(-1, D).index_copy_(0, place_BK, k.reshape(B * K, D))
        values.view(-1, D).index_copy_(0, place_BK, v.reshape(B * K, D))
        keys, values = keys.view(-1, columns, D)[: B * K], values.view(-1, columns, D)[: B * K]
        q_BK = q.reshape(B * K, -1, D)  # the queries that share a kv head
        attended = _attend_rows(q_BK, keys[:, :common], values[:, :common], bias_BK_1_T)
        for row, until in zip(long_rows, reaches):  # noqa: B905  (TorchScript knows no `strict`)
            first, stop = row * K, (row + 1) * K
            attended[first:stop] = _attend_rows(
                q_BK[first:stop], keys[first:stop, :until], values[first:stop, :until], bias_BK_1_T[:1, :, :1]
            )
        x = _after_attention(layer, i, x, attended.view(B, -1), parts, runs)
    return x


@scripted
def take_runs(
    x_N_H: Tensor,
    cos_N_1_D: Tensor,
    sin_N_1_D: Tensor,
    heads: int,
    starts: list[int],
    sizes: list[int],
    kvs: list[Tensor],
    wanted_W: Tensor,
    layers: list[BaseLayer],
    runs: list[Run],
    wanted_runs: list[Run],
) -> Tensor:
    """Hidden states [W, H] after all layers at the `wanted` of N tokens: runs of `sizes` tokens of prompts, each from
    `starts` on, whose keys and values go to `kvs` [layers, 2, kv heads, size, d]. `wanted_runs` are the runs as they
    lie in W."""
    parts: list[Part] = []
    x = x_N_H
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        qkv = _queries(layer, i, x, parts, runs)
        q, k, v = _heads_of(layer, qkv, cos_N_1_D, sin_N_1_D, heads)
        found: list[Tensor] = []
        first = 0
        for run in range(len(sizes)):
            start, size = starts[run], sizes[run]
            keys, values = kvs[run][i, 0], kvs[run][i, 1]
            keys[:, start : start + size] = k[first : first + size].transpose(0, 1)
            values[:, start : start + size] = v[first : first + size].transpose(0, 1)
            keys, values = keys[:, : start + size], values[:, : start + size]
            groups = heads // keys.size(0)
            if groups > 1:
                keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
            seen: Optional[Tensor] = None  # plain causal
            if start > 0:
                rows = torch.arange(start, start + size, device=x.device)
                seen = torch.arange(start + size, device=x.device) <= rows.unsqueeze(1)
            attended_run = F.scaled_dot_product_attention(
                q[first : first + size].transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0),
                attn_mask=seen, is_causal=start == 0,
            )
            found.append(attended_run[0].transpose(0, 1).reshape(size, -1))
            first += size
        attended = torch.cat(found)
        worn = runs
        if i == last:
            x, attended, worn = x[wanted_W], attended[wanted_W], wanted_runs
        x = _after_attention(layer, i, x, attended, parts, worn)
    return x
