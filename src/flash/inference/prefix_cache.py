"""Keys and values of prompts seen before, so that a prompt that begins like one of them starts further on.

Owns a tree of token blocks for each owner, within a budget of bytes; the least recently used block goes first.
Blocks are found by the tokens themselves, not by a hash of them. An owner is (adapter, scope): what one owner
stored, no other can see. Knows no model: a block's content is whatever tensor the decoder gave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Owner = tuple[str, str]

BLOCK = 16  # tokens


@dataclass(eq=False, repr=False)
class _Block:
    parent: _Block | None
    tokens: tuple[int, ...]
    content: Tensor | None  # None: the root of an owner's tree
    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)


class PrefixCache:
    """Not for several threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.bytes = 0
        self._roots: dict[Owner, _Block] = {}
        # Least recently used first. Whoever uses a block uses its parents after it, so the first has no children.
        self._by_use: OrderedDict[_Block, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_use)

    def longest(self, owner: Owner, tokens: Sequence[int]) -> list[Tensor]:
        """The blocks that `tokens` begin with, in order: `BLOCK` tokens each."""
        path = self._path(owner, tokens)
        self._use(path)
        return [block.content for block in path if block.content is not None]

    def store(self, owner: Owner, tokens: Sequence[int], read: Callable[[int, int], Tensor]) -> None:
        """Keeps the whole blocks of `tokens`; `read(start, stop)` copies the content of those not there yet."""
        path = self._path(owner, tokens)
        block = path[-1] if path else self._roots.setdefault(owner, _Block(None, (), None))
        for start in range(len(path) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            content = read(start, start + BLOCK)
            size = content.numel() * content.element_size()
            if size > self._most_bytes:
                break
            key = tuple(tokens[start : start + BLOCK])
            child = _Block(block, key, content)
            block.children[key] = child
            block = child
            self.bytes += size
            path.append(block)
            self._by_use[block] = None
        self._use(path)
        while self.bytes > self._most_bytes:
            self._remove(next(iter(self._by_use)))

    def drop(self, adapter: str) -> None:
        """Forgets all that was stored under the adapter, in any scope."""
        for owner in [owner for owner in self._roots if owner[0] == adapter]:
            below = list(self._roots.pop(owner).children.values())
            while below:
                block = below.pop()
                below.extend(block.children.values())
                self._forget(block)

    def _path(self, owner: Owner, tokens: Sequence[int]) -> list[_Block]:
        block, path = self._roots.get(owner), []
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = block and block.children.get(tuple(tokens[start : start + BLOCK]))
            if block is None:
                break
            path.append(block)
        return path

    def _use(self, path: Sequence[_Block]) -> None:
        for block in reversed(path):
            self._by_use.move_to_end(block)

    def _remove(self, block: _Block) -> None:
        """Takes out a block without children."""
        parent = block.parent
        assert parent is not None
        del parent.children[block.tokens]
        self._forget(block)

    def _forget(self, block: _Block) -> None:
        assert block.content is not None
        self.bytes -= block.content.numel() * block.content.element_size()
        del self._by_use[block]
