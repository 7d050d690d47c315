"""The prefix cache against the plainest one there is: a list of everything stored."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from flash.inference.prefix_cache import BLOCK, PrefixCache

LETTERS = st.sampled_from("ab")
texts = st.lists(st.lists(LETTERS, max_size=5), max_size=8)
owners = st.tuples(st.sampled_from(["", "x#1", "x#2"]), st.sampled_from(["", "org"]))


def tokens_of(blocks: list[str], tail: int) -> tuple[int, ...]:
    """Blocks of one repeated token each, and a few tokens more."""
    return tuple(ord(letter) for letter in blocks for _ in range(BLOCK)) + (7,) * tail


def content(owner: Any, tokens: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """What a decoder would store, recognisable: whose it is and the tokens up to there."""
    return torch.tensor([hash((owner, tokens[:stop])) % 2**31, start], dtype=torch.int32)


operations = st.lists(
    st.tuples(st.sampled_from(["store", "look", "drop"]), owners, st.lists(LETTERS, max_size=5), st.integers(0, 15)),
    max_size=40,
)


@given(operations)
def test_an_owner_finds_the_longest_prefix_that_it_stored_and_nothing_of_others(operations: list[Any]) -> None:
    cache = PrefixCache(1 << 30)
    stored: list[tuple[Any, tuple[int, ...]]] = []
    for what, owner, blocks, tail in operations:
        tokens = tokens_of(blocks, tail)
        if what == "store":
            cache.store(owner, tokens, lambda start, stop, o=owner, t=tokens: content(o, t, start, stop))
            stored.append((owner, tokens))
        elif what == "drop":
            cache.drop(owner[0])
            stored = [(other, kept) for other, kept in stored if other[0] != owner[0]]
        longest = 0
        for other, kept in stored:
            for count in range(1, min(len(kept), len(tokens)) // BLOCK + 1):
                if other == owner and kept[: count * BLOCK] == tokens[: count * BLOCK]:
                    longest = max(longest, count)
        found = cache.longest(owner, tokens)
        assert len(found) == longest
        for i, block in enumerate(found):
            assert torch.equal(block, content(owner, tokens, i * BLOCK, (i + 1) * BLOCK))
    kinds = {(owner, kept[: n * BLOCK]) for owner, kept in stored for n in range(1, len(kept) // BLOCK + 1)}
    assert len(cache) == len(kinds) and cache.bytes == 8 * len(kinds)


@given(operations, st.integers(0, 12))
def test_it_stays_within_its_bytes_and_keeps_what_was_used_last(operations: list[Any], most: int) -> None:
    cache = PrefixCache(8 * most)
    for what, owner, blocks, tail in operations:
        tokens = tokens_of(blocks, tail)
        if what == "drop":
            cache.drop(owner[0])
            continue
        if what == "store":
            cache.store(owner, tokens, lambda start, stop, o=owner, t=tokens: content(o, t, start, stop))
            # the newest is whole, or as much of its beginning as there is room for
            assert len(cache.longest(owner, tokens)) == min(len(blocks), most)
        for i, block in enumerate(cache.longest(owner, tokens)):
            assert torch.equal(block, content(owner, tokens, i * BLOCK, (i + 1) * BLOCK))
        assert cache.bytes == 8 * len(cache) <= 8 * most
