"""Which of several servers acts: the one that holds a lock on the database they share.

Owns taking, keeping and losing the lead. The lock belongs to a session of its own; Postgres frees it when the process
dies, when its machine goes away, or when the session was silent for the lease, by Postgres' own clock. A leader that
was stopped and comes back sees the session gone before it acts; and since every action is a compare-and-set, one that
is a moment late changes nothing. Knows nothing of what a leader does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from sqlalchemy.engine import URL

if TYPE_CHECKING:
    from flash.storage.postgres import Session

log = logging.getLogger("flash.leading")


class Lead(Protocol):
    @property
    def term(self) -> int:
        """0 while another server leads; else a number that rises each time that this one takes the lead."""

    def start(self, on_change: Callable[[], None]) -> None:
        """From now on it may take the lead; `on_change` is called when it has."""

    def close(self) -> None:
        """Gives the lead back."""


class Alone:
    """The one server of its database."""

    term = 1

    def start(self, on_change: Callable[[], None]) -> None:
        """It leads already."""

    def close(self) -> None:
        """There is nobody to give it to."""


class Elected:
    """One of several servers of a Postgres database. `lease_s`: how long a silent leader keeps the others waiting."""

    def __init__(self, url: URL, lease_s: float) -> None:
        self._url = url
        self._lease_s = lease_s
        self._session: Session | None = None
        self._term = 0
        self._sure_until = 0.0  # monotonic
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def term(self) -> int:
        return self._term if time.monotonic() < self._sure_until else 0

    def start(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._thread = threading.Thread(target=self._loop, name="leading", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._drop()

    def _loop(self) -> None:
        while not self._closed.is_set():
            try:
                self._look()
            except Exception:  # whatever it was: a server whose thread died here would never lead again
                log.exception("the look for the lead failed")
                self._drop()
            self._closed.wait(self._lease_s / 8)

    def _look(self) -> None:
        from flash.storage import postgres

        asked = time.monotonic()
        try:
            if self._session is None:
                self._session = postgres.Session(self._url, silent_s=self._lease_s)
            if self._sure_until:
                self._session.ping()
            elif not self._session.try_lock(postgres.LEADER):
                return
        except postgres.SESSION_ERRORS as error:
            if self._sure_until:
                log.warning("the lead is lost: %s", " ".join(str(error).split())[:200])
            self._drop()
            return
        first = not self._sure_until
        if first:
            self._term += 1
        self._sure_until = asked + self._lease_s
        if first:
            log.info("this server leads (term %d)", self._term)
            self._on_change()

    def _drop(self) -> None:
        """The session ends, and with it the lock."""
        self._sure_until = 0.0
        if self._session is not None:
            self._session.close()
            self._session = None
