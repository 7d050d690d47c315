"""Decodes rows of many adapters in one batch: prompts come in by chunks, rows join and leave at any step.

Owns the key-value cache of what is being served and the forward pass of Qwen3- and Llama-layout models over
it, straight from the base's weights. Row b's tokens lie in columns 0 to `lengths[b]` of its own slot, so
nothing moves when another row joins, and a cached prefix is copied in as it is. Adapters come from a bank.
Neither samples, stops nor knows a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor, nn

from flash.inference.adapter_bank import AdapterBank, Home, Mix, Runs, Site
from flash.inference.copied_layers import Norms, rms_norm
from flash.inference.decoding import Rotations, agrees, rotated, row_layout

_GROWTH = 128  # columns by which a full cache grows at least
_MOST_COPIED = 20_000_000  # parameters of a model whose projections are copied side by side, at start
_LONG_ROW = 1024  # attending to one row by itself costs as much as this many columns of a batch

_QKV, _OUT, _GATE_UP, _DOWN = range(4)  # a layer's sites
_SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(eq=False, repr=False)
class Opening:
    """A prompt on its way in: the keys and values of its first `length` tokens, [layers, 2, kv heads, size, d]."""

    kv: Tensor
    length: int


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a prompt. `every`: logits after each of them are wanted, not only after the last."""

    opening: Opening
    tokens: Sequence[int]
    home: Home | None
    every: bool = False


def build_mixed_decoder(model: nn.Module, *, max_adapters: int) -> MixedDecoder | None:
    """None if the model's layout is not known, or its logits don't agree."""
    if not row_layout(model):
        return None
    decoder = MixedDecoder(model, max_adapters=max_adapters)

    def ours(tokens_T: Tensor) -> Tensor:
        opening = decoder.open(len(tokens_T) - 2)
        chunks = tokens_T[:-2].split(4)
        ended = [decoder.prefill([Chunk(opening, chunk.tolist(), None)])[0] for chunk in chunks][-1]
        decoder.admit(opening, None, 1)
        return torch.cat([ended, *(decoder.step(token_1) for token_1 in tokens_T[-2:].split(1))])

    try:
        return decoder if agrees(model, ours) else None
    finally:
        decoder.clear()


class MixedDecoder:
    def __init__(self, model: Any, *, max_adapters: int) -> None:
        self._model = model
        self._body: Any = self._model.model
        config: Any = self._model.config
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        weight: Tensor = self._body.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        copied = sum(each.numel() for each in model.parameters()) <= _MOST_COPIED
        self._layers = [_BaseLayer(layer, copied) for layer in self._body.layers]
        sites = [site for i, layer in enumerate(self._body.layers) for site in _sites(i, layer)]
        self.bank = AdapterBank(sites, device=self._device, dtype=self._dtype, most=max_adapters)
        self._rotations = Rotations(self._body, self._head_dim)
        self.clear()

    def clear(self) -> None:
        """Drops all rows and the cache's memory."""
        # [layers, 2, rows, kv heads, columns, head dim]
        self._kv = torch.zeros(
            len(self._layers), 2, 0, self._kv_heads, 0, self._head_dim, device=self._device, dtype=self._dtype
        )
        self._lengths: list[int] = []
        self._homes: list[Home | None] = []
        self._mix: Mix | None = None  # None: the rows changed
        self._lengths_B = torch.zeros(0, dtype=torch.long, device=self._device)

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def bytes_per_token(self) -> int:
        return 2 * len(self._layers) * self._kv_heads * self._head_dim * self._kv.element_size()

    @property
    def cache_bytes(self) -> int:
        return self._kv.numel() * self._kv.element_size()

    def open(self, size: int, cached: Sequence[Tensor] = ()) -> Opening:
        """Room for a prompt of `size` tokens, of which the first are cached: pieces [layers, 2, kv heads, n, d]."""
        shape = (*self._kv.shape[:2], self._kv_heads, size, self._head_dim)
        kv = torch.empty(shape, device=self._device, dtype=self._dtype)
        length = 0
        for piece in cached:
            taken = min(piece.shape[3], size - length)
            kv[:, :, :, length : length + taken] = piece[:, :, :, :taken]
            length += taken
        return Opening(kv, length)

    def prefill(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Runs the next tokens of some prompts in one forward; for each, logits [1, V] after its last token, or
        [tokens, V] after every one."""
        sizes = [len(chunk.tokens) for chunk in chunks]
        tokens_N = torch.tensor([token for chunk in chunks for token in chunk.tokens], device=self._device)
        starts = [chunk.opening.length for chunk in chunks]
        positions_N = torch.cat(
            [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        ).to(self._device)
        cos, sin = self._rotations.at(positions_N, max(map(sum, zip(starts, sizes, strict=True))))
        runs = Runs(self.bank, [(size, chunk.home) for size, chunk in zip(sizes, chunks, strict=True)])
        hidden = [_causal(start, size, self._device) for start, size in zip(starts, sizes, strict=True)]

        def attend(layer: int, q_N: Tensor, k_N: Tensor, v_N: Tensor) -> Tensor:
            out, first = [], 0
            for chunk, start, size, mask in zip(chunks, starts, sizes, hidden, strict=True):
                part = slice(first, first + size)
                keys, values = chunk.opening.kv[layer]
                keys[:, start : start + size] = k_N[part].transpose(0, 1)
                values[:, start : start + size] = v_N[part].transpose(0, 1)
                out.append(self._attend_run(q_N[part], keys[:, : start + size], values[:, : start + size], mask))
                first += size
            return torch.cat(out) if len(out) > 1 else out[0]

        x_N_H = self._forward(tokens_N, cos, sin, runs, attend)
        for chunk, size in zip(chunks, sizes, strict=True):
            chunk.opening.length += size
        logits: list[Tensor] = []
        first = 0
        for chunk, size in zip(chunks, sizes, strict=True):
            wanted = x_N_H[first if chunk.every else first + size - 1 : first + size]
            logits.append(self._logits(wanted))
            first += size
        return logits

    def admit(self, opening: Opening, home: Home | None, repeats: int) -> None:
        """Appends `repeats` rows that go on from the prompt."""
        first, length = self.rows, opening.length
        self._reserve(first + repeats, length + 1)
        self._kv[:, :, first : first + repeats, :, :length] = opening.kv[:, :, None, :, :length]
        self._lengths.extend([length] * repeats)
        self._homes.extend([home] * repeats)
        self._rows_changed()

    def step(self, tokens_B: Tensor) -> Tensor:
        """Appends one token to each row; logits [rows, V] after it."""
        B, K = self.rows, self._kv_heads
        self._reserve(B, max(self._lengths) + 1)
        if self._mix is None:
            self._mix = Mix(self.bank, self._homes)
        capacity = self._kv.shape[4]
        cos, sin = self._rotations.at(self._lengths_B, max(self._lengths) + 1)
        heads_B_K = torch.arange(B * K, device=self._device).view(B, K)
        place_BK = (heads_B_K * capacity + self._lengths_B[:, None]).view(-1)
        common, long = _split([length + 1 for length in self._lengths])
        later_B_T = torch.arange(common, device=self._device) > self._lengths_B[:, None]
        bias_B_T = torch.zeros(B, common, device=self._device, dtype=self._dtype)
        bias_BK_1_T = bias_B_T.masked_fill_(later_B_T, float("-inf")).repeat_interleave(K, dim=0)[:, None]
        flat = self._kv.view(len(self._layers), 2, -1, self._head_dim)
        by_head = self._kv.view(len(self._layers), 2, -1, capacity, self._head_dim)

        def attend(layer: int, q_B: Tensor, k_B: Tensor, v_B: Tensor) -> Tensor:
            keys, values = flat[layer]
            keys.index_copy_(0, place_BK, k_B.reshape(B * K, -1))
            values.index_copy_(0, place_BK, v_B.reshape(B * K, -1))
            keys, values = by_head[layer]
            q_BK = q_B.reshape(B * K, -1, self._head_dim)  # the queries that share a kv head
            out = self._attend_rows(q_BK, keys[: B * K, :common], values[: B * K, :common], bias_BK_1_T)
            for row in long:
                own = slice(row * K, (row + 1) * K)
                until = self._lengths[row] + 1
                out[own] = self._attend_rows(q_BK[own], keys[own, :until], values[own, :until], bias_BK_1_T[:1, :, :1])
            return out.view(B, -1)

        x_B_H = self._forward(tokens_B, cos, sin, self._mix, attend)
        self._lengths = [length + 1 for length in self._lengths]
        self._lengths_B += 1
        return self._logits(x_B_H)

    def keep(self, order: Sequence[int]) -> None:
        """Row i becomes what row `order[i]` was; the others are dropped. A row may only move to a lower index
        that is not kept itself (fill holes from the end)."""
        for new, old in enumerate(order):
            if new != old:
                length = self._lengths[old]
                self._kv[:, :, new, :, :length] = self._kv[:, :, old, :, :length]
        self._lengths = [self._lengths[old] for old in order]
        self._homes = [self._homes[old] for old in order]
        self._rows_changed()

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of a row's keys and values, [layers, 2, kv heads, stop - start, head dim]."""
        return self._kv[:, :, row, :, start:stop].clone()

    def _rows_changed(self) -> None:
        self._lengths_B = torch.tensor(self._lengths, dtype=torch.long, device=self._device)
        self._mix = None

    def _forward(self, tokens_N: Tensor, cos: Tensor, sin: Tensor, adapters: Mix | Runs, attend: Any) -> Tensor:
        """Hidden states [N, H] after the last layer; `attend(layer, q, k, v)` files keys and values away."""
        x = self._body.embed_tokens(tokens_N)
        for i, layer in enumerate(self._layers):
            site = len(_SITES) * i
            normed = layer.attention_norm(x)
            qkv = layer.project(_QKV, normed)
            adapters.add(qkv, normed, site + _QKV)
            q, k, v = self._heads_of(layer, qkv, cos, sin)
            attended = attend(i, q, k, v)
            out = layer.project(_OUT, attended)
            adapters.add(out, attended, site + _OUT)
            x = x + out
            normed = layer.mlp_norm(x)
            gate_up = layer.project(_GATE_UP, normed)
            adapters.add(gate_up, normed, site + _GATE_UP)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = layer.activation(gate) * up
            down = layer.project(_DOWN, inner)
            adapters.add(down, inner, site + _DOWN)
            x = x + down
        return x

    def _logits(self, x_N_H: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(rms_norm(x_N_H, self._body.norm))
        return logits

    def _attend_rows(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """One token a row: q [rows * kv heads, queries, d] over keys and values [rows * kv heads, T, d]."""
        scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=self._head_dim**-0.5)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, values)

    def _attend_run(self, q_T: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """A run of one prompt: q [T, heads, d] over keys and values [kv heads, columns, d]; [T, heads * d]."""
        groups = self._heads // self._kv_heads
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
        attended = F.scaled_dot_product_attention(
            q_T.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None
        )
        return attended[0].transpose(0, 1).reshape(len(q_T), -1)

    def _heads_of(self, layer: _BaseLayer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N, heads, head dim], normed where the layout says so, and rotated."""
        qkv = qkv.view(len(qkv), -1, self._head_dim)
        qk, v = qkv.split([self._heads + self._kv_heads, self._kv_heads], dim=1)
        qk = rotated(layer.qk_norm(qk, self._heads), cos, sin)
        return qk[:, : self._heads], qk[:, self._heads :], v

    def _reserve(self, rows: int, columns: int) -> None:
        """Makes room for that many rows and columns, moving what is there."""
        have_rows, have_columns = self._kv.shape[2], self._kv.shape[4]
        if rows <= have_rows and columns <= have_columns:
            return
        if rows > have_rows:
            rows = max(rows, have_rows + have_rows // 2)
        if columns > have_columns:
            columns = -(-max(columns, have_columns + have_columns // 2) // _GROWTH) * _GROWTH
        old, used = self._kv, max(self._lengths, default=0)
        shape = (*old.shape[:2], max(rows, have_rows), self._kv_heads, max(columns, have_columns), self._head_dim)
        # zeros, not empty: a hidden column still takes part in weights @ values, as 0 times its content
        self._kv = torch.zeros(shape, device=self._device, dtype=self._dtype)
        self._kv[:, :, : self.rows, :, :used] = old[:, :, : self.rows, :, :used]


def _sites(number: int, layer: Any) -> list[Site]:
    sites = []
    for names in _SITES:
        linears = [layer.get_submodule(name) for name in names]
        paths = tuple(f"model.layers.{number}.{name}" for name in names)
        sites.append(Site(paths, linears[0].in_features, tuple(linear.out_features for linear in linears)))
    return sites


class _BaseLayer(Norms):
    """One layer's own weights. In small models projections that share an input are one product over a copy."""

    def __init__(self, layer: Any, copied: bool) -> None:
        super().__init__(layer)
        self.activation = layer.mlp.act_fn
        self._projections: list[list[tuple[Tensor, Tensor | None]]] = []
        for names in _SITES:
            linears = [layer.get_submodule(name) for name in names]
            pairs = [(linear.weight, linear.bias) for linear in linears]
            if copied and len(pairs) > 1:
                biases = [bias for _, bias in pairs if bias is not None]
                pairs = [(torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None)]
            self._projections.append(pairs)

    def project(self, site: int, x: Tensor) -> Tensor:
        """The site's layers' outputs side by side, without any adapter."""
        outputs = [F.linear(x, weight, bias) for weight, bias in self._projections[site]]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _causal(start: int, size: int, device: torch.device) -> Tensor | None:
    """What tokens `start` to `start + size` may attend to, [size, start + size]; None where it is plain causal."""
    if not start:
        return None
    rows = torch.arange(start, start + size, device=device)
    return torch.arange(start + size, device=device) <= rows[:, None]


def _split(reaches: Sequence[int]) -> tuple[int, list[int]]:
    """How many columns all rows attend to together, and which rows attend to more by themselves.

    One long row would make every other row read as many columns as it has.
    """
    order = sorted(range(len(reaches)), key=lambda row: -reaches[row])
    best, cost = 0, len(order) * reaches[order[0]]
    alone = 0
    for count in range(1, len(order)):
        alone += reaches[order[count - 1]] + _LONG_ROW
        if (total := alone + len(order) * reaches[order[count]]) < cost:
            best, cost = count, total
    return reaches[order[best]], order[:best]
