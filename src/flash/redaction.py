"""Secrets taken out of text by value, wherever what a run says is kept or shown.

Owns how a value is found (plain, escaped, cut in two) and what stands in its place. Knows nothing of where secrets
come from or where the text goes: workers use it first, and the control plane behind them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # characters; shorter values would blank out ordinary text


class Redactor:
    """Replaces secret values by `[redacted]`, in whole strings and in streams cut at arbitrary places."""

    def __init__(self, values: Iterable[str]) -> None:
        forms = {form for value in values for form in _forms(value) if len(form) >= SHORTEST_SECRET}
        self._forms = sorted(forms, key=len, reverse=True)  # the longest first: one secret may hold another
        self._pattern = re.compile("|".join(map(re.escape, self._forms))) if forms else None

    def text(self, text: str) -> str:
        return self._pattern.sub(REDACTED, text) if self._pattern else text

    def value(self, value: Any) -> Any:
        """The same JSON value with every string in it, keys included, redacted and fit for any database."""
        if isinstance(value, str):
            return self.text(storable(value))
        if isinstance(value, dict):
            return {self.text(storable(str(key))): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def held_back(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a secret."""
        longest = 0
        for form in self._forms:
            for size in range(min(len(form) - 1, len(text)), longest, -1):
                if text.endswith(form[:size]):
                    longest = size
                    break
        return longest

    def piece(self, text: str) -> str:
        """One of several pieces of a text: a secret's beginning at its end goes too, and an end at its beginning.

        A part of fewer than 8 characters stays.
        """
        text = self.text(text)
        for form in self._forms:
            at = text.find(form[:SHORTEST_SECRET])
            while at >= 0 and not form.startswith(text[at:]):
                at = text.find(form[:SHORTEST_SECRET], at + 1)
            if at >= 0:
                text = text[:at] + REDACTED
            end = text.rfind(form[-SHORTEST_SECRET:]) + SHORTEST_SECRET
            while end >= SHORTEST_SECRET and not form.endswith(text[:end]):
                end = text.rfind(form[-SHORTEST_SECRET:], 0, end - 1) + SHORTEST_SECRET
            if end >= SHORTEST_SECRET:
                text = REDACTED + text[end:]
        return text


def _forms(value: str) -> Iterable[str]:
    """A secret as it may be printed: plain, JSON- or Python-escaped, in a URL, line by line."""
    yield value
    yield value.strip()
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
    yield quote(value, safe="")
    yield from (line.strip() for line in value.splitlines())


def storable(text: str) -> str:
    """No lone surrogates (not UTF-8) and no NUL (not in Postgres's text)."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
