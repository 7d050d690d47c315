"""Decodes rows of many adapters in one batch: prompts come in by chunks, rows join and leave at any step.

Owns the key-value cache of what is being served and the forward pass of Qwen3- and Llama-layout models over
it, straight from the base's weights. Row b's tokens lie in columns 0 to `lengths[b]` of its own slot, so
nothing moves when another row joins, and a cached prefix is copied in as it is. Adapters come from a bank.
Neither samples, stops nor knows a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's usual name)
from torch import Tensor, nn

from flash.inference.adapter_bank import AdapterBank, Home, Mix, Runs, Site
from flash.inference.adapter_updates import Part, Run
from flash.inference.decoding import Rotations, agrees, row_layout
from flash.inference.lanes import ONE_LANE, Lanes, balanced
from flash.inference.mixed_layers import SITES, base_layer, step_rows, take_runs

_GROWTH = 128  # columns by which a full cache grows at least
_MOST_COPIED = 20_000_000  # parameters of a model whose projections are copied side by side, at start
_LONG_ROW = 1024  # attending to one row by itself costs as much as this many columns of a batch

_LEAST_TOKENS = 64  # of prompts; fewer are not worth a lane of their own
_LEAST_ROWS = 16  # nor are fewer rows


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


def build_mixed_decoder(model: nn.Module, *, max_adapters: int, lanes: Lanes = ONE_LANE) -> MixedDecoder | None:
    """None if the model's layout is not known, or its logits don't agree."""
    if not row_layout(model) or getattr(model.config, "hidden_act", None) != "silu":
        return None
    decoder = MixedDecoder(model, max_adapters=max_adapters, lanes=lanes)

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
    def __init__(self, model: Any, *, max_adapters: int, lanes: Lanes = ONE_LANE) -> None:
        self._model = model
        self._lanes = lanes
        self._body: Any = self._model.model
        config: Any = self._model.config
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        weight: Tensor = self._body.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        copied = sum(each.numel() for each in model.parameters()) <= _MOST_COPIED
        self._layers = [base_layer(layer, copied) for layer in self._body.layers]
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
        self._mixes: list[Mix] | None = None  # one a lane; None: the rows changed
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
        """Runs the next tokens of some prompts, one forward a lane; for each, logits [1, V] after its last token, or
        [tokens, V] after every one."""
        sizes = [len(chunk.tokens) for chunk in chunks]
        parts = balanced(sizes, min(self._lanes.count, max(1, sum(sizes) // _LEAST_TOKENS)))
        work = [partial(self._prefill, chunks[part.start : part.stop]) for part in parts]
        return [logits for found in self._lanes.run(work) for logits in found]

    @torch.inference_mode()  # a thread's own
    def _prefill(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        sizes = [len(chunk.tokens) for chunk in chunks]
        tokens_N = torch.tensor([token for chunk in chunks for token in chunk.tokens], device=self._device)
        starts = [chunk.opening.length for chunk in chunks]
        positions_N = torch.cat(
            [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        ).to(self._device)
        cos, sin = self._rotations.at(positions_N, max(map(sum, zip(starts, sizes, strict=True))))
        wanted_W: list[int] = []  # the last layer goes on with these alone
        kept: list[int] = []  # ... so many of each chunk
        for first, size, chunk in zip(accumulate(sizes, initial=0), sizes, chunks, strict=False):
            kept.append(size if chunk.every else 1)
            wanted_W.extend(range(first + size - kept[-1], first + size))
        x_W_H = take_runs(
            self._body.embed_tokens(tokens_N), cos, sin, self._heads, starts, sizes,
            [chunk.opening.kv for chunk in chunks], torch.tensor(wanted_W, device=self._device), self._layers,
            self._runs(chunks, sizes), self._runs(chunks, kept),
        )  # fmt: skip
        for chunk, size in zip(chunks, sizes, strict=True):
            chunk.opening.length += size
        return list(self._logits(x_W_H).split(kept))

    def _runs(self, chunks: Sequence[Chunk], sizes: Sequence[int]) -> list[Run]:
        return Runs(self.bank, [(size, chunk.home) for size, chunk in zip(sizes, chunks, strict=True)]).parts

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
        B = self.rows
        self._reserve(B, max(self._lengths) + 1)
        parts = balanced([1] * B, min(self._lanes.count, max(1, B // _LEAST_ROWS)))
        if self._mixes is None:
            self._mixes = [Mix(self.bank, self._homes[part.start : part.stop]) for part in parts]
        work = [partial(self._step, part, mix.parts, tokens_B) for part, mix in zip(parts, self._mixes, strict=True)]
        logits = self._lanes.run(work)
        self._lengths = [length + 1 for length in self._lengths]
        self._lengths_B += 1
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    @torch.inference_mode()  # a thread's own
    def _step(self, rows: range, adapters: list[Part], tokens_B: Tensor) -> Tensor:
        """`step` for some of the rows."""
        part, K, capacity = slice(rows.start, rows.stop), self._kv_heads, self._kv.shape[4]
        lengths_B = self._lengths_B[part]
        cos, sin = self._rotations.at(lengths_B, max(self._lengths) + 1)
        heads_B_K = torch.arange(len(rows) * K, device=self._device).view(-1, K)
        place_BK = (heads_B_K * capacity + lengths_B[:, None]).view(-1)
        common, long = _split([length + 1 for length in self._lengths[part]])
        later_B_T = torch.arange(common, device=self._device) > lengths_B[:, None]
        bias_B_T = torch.zeros(later_B_T.shape, device=self._device, dtype=self._dtype)
        bias_BK_1_T = bias_B_T.masked_fill_(later_B_T, float("-inf")).repeat_interleave(K, dim=0)[:, None]
        x_B_H = step_rows(
            self._body.embed_tokens(tokens_B[part]), cos, sin, self._heads, self._kv[:, :, part], place_BK,
            bias_BK_1_T, long, [self._lengths[rows.start + row] + 1 for row in long], self._layers, adapters,
        )  # fmt: skip
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
        self._mixes = None

    def _logits(self, x_N_H: Tensor) -> Tensor:
        norm = self._body.norm
        logits: Tensor = self._model.lm_head(
            F.rms_norm(x_N_H, x_N_H.shape[-1:], norm.weight, norm.variance_epsilon)
        )
        return logits

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
    for names in SITES:
        linears = [layer.get_submodule(name) for name in names]
        paths = tuple(f"model.layers.{number}.{name}" for name in names)
        sites.append(Site(paths, linears[0].in_features, tuple(linear.out_features for linear in linears)))
    return sites


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
