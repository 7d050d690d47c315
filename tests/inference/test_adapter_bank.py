"""Updates from the bank are the adapters' own, whoever shares the batch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flash.inference.adapter_bank import AdapterBank, Home, Mix, Runs, Site
from flash.inference.lora import Adapter, LoraPair, LoraShape

SITES = [Site(("q", "k", "v"), 12, (16, 8, 8)), Site(("o",), 16, (12,)), Site(("g", "u"), 12, (20, 20))]
CPU = torch.device("cpu")


def adapter(rank: int, seed: int, without: str = "") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for site in SITES:
        for path, width in zip(site.paths, site.widths, strict=True):
            A = nn.Parameter(torch.randn(rank, site.in_features, generator=generator), requires_grad=False)
            B = nn.Parameter(torch.randn(width, rank, generator=generator), requires_grad=False)
            if path != without:
                pairs[path] = LoraPair(A, B, 0.5)
    return Adapter(LoraShape(rank, rank / 2), pairs)


def update(of: Adapter | None, site: Site, x: torch.Tensor) -> torch.Tensor:
    """The plainest way to say it."""
    parts = []
    for path, width in zip(site.paths, site.widths, strict=True):
        pair = of and of.pairs.get(path)
        parts.append(pair.scaling * (x @ pair.A.t() @ pair.B.t()) if pair else torch.zeros(len(x), width))
    return torch.cat(parts, dim=1)


ADAPTERS = [adapter(rank, seed, without) for seed, (rank, without) in enumerate(
    [(1, ""), (8, ""), (9, ""), (16, "q"), (16, "v"), (40, ""), (8, "o"), (3, "u")]
)]  # fmt: skip
wearers = st.lists(st.none() | st.integers(0, len(ADAPTERS) - 1), min_size=1, max_size=12)


@given(wearers, st.booleans(), st.integers(8, 10))
def test_a_batch_of_any_adapters_gets_each_rows_own_update(worn: list[int | None], sums: bool, most: int) -> None:
    bank = AdapterBank(SITES, device=CPU, dtype=torch.float32, most=most, sums=sums)
    homes = [None if i is None else bank.pin(str(i), ADAPTERS[i]) for i in worn]
    mix = Mix(bank, homes)
    runs = Runs(bank, [(3, home) for home in homes])
    for number, site in enumerate(SITES):
        x = torch.randn(3 * len(worn), site.in_features)
        expected = torch.cat([update(None if i is None else ADAPTERS[i], site, part) for i, part in zip(
            worn, x.split(3), strict=True)])  # fmt: skip
        base = torch.randn(expected.shape)
        together, one_each = base.clone(), base[::3].clone()
        runs.add(together, x, number)
        mix.add(one_each, x[::3], number)
        assert torch.allclose(together, base + expected, atol=1e-4)
        assert torch.allclose(one_each, (base + expected)[::3], atol=1e-4)


@given(st.lists(st.integers(0, len(ADAPTERS) - 1), max_size=40))
def test_adapters_come_and_go_and_none_that_is_needed_goes(asked: list[int]) -> None:
    bank = AdapterBank(SITES, device=CPU, dtype=torch.float32, most=2)
    kept: list[tuple[int, Home]] = []
    x = torch.randn(2, 12)
    for i in asked:
        if len({each for each, _ in kept} | {i}) > 2:
            for _, home in kept:
                bank.unpin(home)
            kept = []
        kept.append((i, bank.pin(str(i), ADAPTERS[i])))
        assert len(bank) <= 2
        for each, home in kept:
            out = torch.zeros(2, 32)
            Mix(bank, [home, home]).add(out, x, 0)
            assert torch.allclose(out, update(ADAPTERS[each], SITES[0], x), atol=1e-4)


def test_what_is_dropped_leaves_its_place_to_others() -> None:
    bank = AdapterBank(SITES, device=CPU, dtype=torch.float32, most=100)
    first = bank.pin("first", ADAPTERS[1])
    bank.unpin(first)
    bank.drop("first")
    bank.drop("never there")
    assert len(bank) == 0
    assert bank.pin("second", ADAPTERS[6]).slot == first.slot
    out = torch.zeros(1, 12)
    Mix(bank, [bank.pin("second", ADAPTERS[6])]).add(out, torch.randn(1, 16), 1)
    assert not out.any()  # that adapter leaves this layer out; nothing of the first is left there


def test_a_site_is_cut_into_pieces_of_one_width() -> None:
    assert SITES[0].unit == 8 and SITES[0].pieces == [0, 0, 1, 2]
    assert Site(("a",), 4, (6,)).pieces == [0]
