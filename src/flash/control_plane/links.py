"""One-time links by which a browser gets the key of whoever asked for one.

`flash dashboard` holds a key and a browser does not. The command asks for a code; the browser hands the code in and
gets that same key, so that whatever ends the key ends the browser's access too. Codes are random, good once and for
a short while, kept in memory alone, and travel behind the # of an address, which browsers send to no one.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable

from flash.errors import Unauthorized

VALID_S = 120.0
_MOST = 100  # codes that wait at once


class Links:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, tuple[float, str]] = {}  # a code's digest → until when, key
        self._lock = threading.Lock()

    def make(self, key: str) -> str:
        """A code for this key."""
        code = secrets.token_urlsafe(32)
        with self._lock:
            self._forget_old()
            while len(self._waiting) >= _MOST:
                self._waiting.pop(next(iter(self._waiting)))
            self._waiting[_digest(code)] = (self._clock() + VALID_S, key)
        return code

    def redeem(self, code: str) -> str:
        """The key behind a code, once. Raises Unauthorized."""
        with self._lock:
            self._forget_old()
            found = self._waiting.pop(_digest(code), None)
        if found is None:
            raise Unauthorized(
                "this link was used before, or is too old", remedy="run `flash dashboard` for a new one"
            )
        return found[1]

    def _forget_old(self) -> None:
        now = self._clock()
        for digest in [digest for digest, (until, _) in self._waiting.items() if until < now]:
            del self._waiting[digest]


def _digest(code: str) -> str:
    """Looked up by digest: the time that a look-up takes tells nothing of the codes."""
    return hashlib.sha256(code.encode("utf-8", "replace")).hexdigest()
