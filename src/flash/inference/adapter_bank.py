"""Many adapters' weights on the device at once, and their updates for the rows of one mixed batch.

Owns where each adapter's matrices lie and how a row meets its own: nothing is merged into the base, and no
weights are copied for a batch. Adapters of about one rank share tables with a slot each. On a CPU a decoded row
reads its slot in place, as a weighted sum of table rows (`embedding_bag` with the activations as weights): faster
than any batched product there, since nothing is padded or gathered. On a GPU, which has bandwidth to spare, each
site's matrices are gathered for one batched product. Long runs of tokens (prompts) use plain products. Knows no
requests and no key-value cache.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from flash.inference.adapter_updates import Part, Run, add_parts, add_runs
from flash.inference.lora import Adapter, LoraPair

_LEAST_RANK = 8  # adapters of a lower rank are padded with zeros to it, others to the next power of two


@dataclass(frozen=True)
class Site:
    """Linear layers that share an input, side by side: their paths, and how wide each one's output is."""

    paths: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]

    @property
    def unit(self) -> int:
        """The widest piece that all outputs can be cut into."""
        return math.gcd(*self.widths)

    @property
    def pieces(self) -> list[int]:
        """For each piece of the whole output, the layer that it belongs to."""
        return [i for i, width in enumerate(self.widths) for _ in range(width // self.unit)]


@dataclass(eq=False)
class Home:
    """Where an adapter lies; `pins` counts those who need it to stay."""

    rank: int
    slot: int
    pins: int = 0


class AdapterBank:
    """At most `most` adapters on the device, the least recently used leaving first, never a pinned one."""

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        device: torch.device,
        dtype: torch.dtype,
        most: int,
        sums: bool | None = None,
    ) -> None:
        """`sums`: rows read their slots in place; None: on a CPU they do."""
        self.sums = device.type == "cpu" if sums is None else sums
        self._sites = list(sites)
        self._device = device
        self._dtype = dtype
        self.most = most
        self._shelves: dict[int, Shelf] = {}
        self._homes: OrderedDict[str, Home] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._homes)

    def pin(self, key: str, adapter: Adapter) -> Home:
        """The adapter's home, filled if it has none yet. Every pin wants its `unpin`; no more than `most` adapters
        may be pinned. One key always means the same weights."""
        home = self._homes.get(key)
        if home is None:
            if len(self._homes) >= self.most:
                self.drop(next(each for each, other in self._homes.items() if not other.pins))
            shelf = self.shelf(_padded(adapter.shape.rank))
            home = self._homes[key] = Home(shelf.rank, shelf.fill(adapter))
        self._homes.move_to_end(key)
        home.pins += 1
        return home

    def unpin(self, home: Home) -> None:
        home.pins -= 1

    def drop(self, key: str) -> None:
        """Forgets an adapter that nobody has pinned."""
        home = self._homes.pop(key, None)
        if home is not None:
            self.shelf(home.rank).free.append(home.slot)

    def shelf(self, rank: int) -> Shelf:
        if rank not in self._shelves:
            self._shelves[rank] = Shelf(rank, self._sites, self._device, self._dtype)
        return self._shelves[rank]


def _padded(rank: int) -> int:
    return max(_LEAST_RANK, 1 << (rank - 1).bit_length())


class Shelf:
    """Tables for adapters of one padded rank R. For each site, with G layers and C pieces of width W:

    `downs[site]` (slots, in, G * R) and `ups[site]` (slots, C, R, W), the scale included.
    """

    def __init__(self, rank: int, sites: Sequence[Site], device: torch.device, dtype: torch.dtype) -> None:
        self.rank = rank
        self.sites = sites
        self.free: list[int] = []
        self.layer_of_piece = [torch.tensor(site.pieces, device=device) for site in sites]
        self.downs = [
            torch.zeros(0, site.in_features, len(site.widths) * rank, device=device, dtype=dtype) for site in sites
        ]
        self.ups = [torch.zeros(0, len(site.pieces), rank, site.unit, device=device, dtype=dtype) for site in sites]

    @property
    def tables(self) -> tuple[int, list[Tensor], list[Tensor], list[Tensor]]:
        return self.rank, self.downs, self.ups, self.layer_of_piece

    def fill(self, adapter: Adapter) -> int:
        """Copies the adapter into a free slot."""
        if not self.free:
            self._grow()
        slot = self.free.pop()
        for site, down, up in zip(self.sites, self.downs, self.ups, strict=True):
            down[slot] = 0
            up[slot] = 0
            first = 0
            for layer, path in enumerate(site.paths):
                pieces = site.widths[layer] // site.unit
                pair = adapter.pairs.get(path)
                if pair is not None:  # an adapter may leave layers out
                    self._copy(pair, down[slot, :, layer * self.rank :], up[slot, first : first + pieces])
                first += pieces
        return slot

    def _copy(self, pair: LoraPair, down_I_R: Tensor, up_C_R_W: Tensor) -> None:
        rank = pair.A.shape[0]
        down_I_R[:, :rank] = pair.A.t()
        up_C_R_W[:, :rank] = (pair.B * pair.scaling).view(up_C_R_W.shape[0], -1, rank).transpose(1, 2)

    def _grow(self) -> None:
        have = self.downs[0].shape[0]
        slots = max(4, 2 * have)
        for tables in (self.downs, self.ups):
            for i, old in enumerate(tables):
                tables[i] = torch.zeros(slots, *old.shape[1:], device=old.device, dtype=old.dtype)
                tables[i][:have] = old
        self.free.extend(reversed(range(have, slots)))


class Runs:
    """Tokens of prompts, one after another: each run of them under one adapter."""

    def __init__(self, bank: AdapterBank, runs: Sequence[tuple[int, Home | None]]) -> None:
        """`runs` holds (tokens, adapter)."""
        self.parts: list[Run] = []
        start = 0
        for home, same in groupby(runs, itemgetter(1)):
            size = sum(tokens for tokens, _ in same)
            if home is not None:
                self.parts.append(Run(start, start + size, home.slot, *bank.shelf(home.rank).tables))
            start += size

    def add(self, out_N_O: Tensor, x_N_I: Tensor, site: int) -> None:
        """Adds to `out` (contiguous), in place, each token's update for its `x`."""
        add_runs(self.parts, out_N_O, x_N_I, site)


class Mix:
    """The rows of a batch, a token each, under any adapters: one part for each shelf that they use."""

    def __init__(self, bank: AdapterBank, homes: Sequence[Home | None]) -> None:
        self.parts: list[Part] = []
        for rank in sorted({home.rank for home in homes if home is not None}):
            rows = [row for row, home in enumerate(homes) if home is not None and home.rank == rank]
            slots = [home.slot for home in homes if home is not None and home.rank == rank]
            self.parts.append(_part(bank, rank, slots, None if len(rows) == len(homes) else rows))

    def add(self, out_B_O: Tensor, x_B_I: Tensor, site: int) -> None:
        """Adds to `out` (contiguous), in place, each row's update for its `x`."""
        add_parts(self.parts, out_B_O, x_B_I, site)


def _part(bank: AdapterBank, rank: int, slots: list[int], rows: list[int] | None) -> Part:
    shelf = bank.shelf(rank)
    device = shelf.downs[0].device
    slots_N = torch.tensor(slots, device=device)
    rows_N = None if rows is None else torch.tensor(rows, device=device)
    bags: list[Tensor] = []
    if bank.sums:
        known: dict[tuple[int, int], list[Tensor]] = {}
        for down, up in zip(shelf.downs, shelf.ups, strict=True):
            for size, count in ((down.shape[1], 1), (up.shape[2], up.shape[1])):
                if (size, count) not in known:
                    known[size, count] = _bags(slots_N, size, count)
                bags.extend(known[size, count])
    return Part(*shelf.tables, rows_N, slots_N, bags)


def _bags(slots_N: Tensor, size: int, count: int) -> list[Tensor]:
    """Index and offsets by which each row takes `count` bags of `size` table rows from its slot."""
    steps = torch.arange(size * count, device=slots_N.device)
    index = (slots_N[:, None] * (size * count) + steps).view(-1).int()
    return [index, torch.arange(0, len(index), size, device=slots_N.device, dtype=torch.int32)]
