"""Whether this server can do its work now: database, store, and that it is not about to stop.

Owns what is asked of each and for how long an answer holds, so that a load balancer may ask as often as it likes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from flash.artifacts.store import Store
from flash.errors import FlashError
from flash.storage.database import Database

_HOLDS_S = 2.0
_STORE_HOLDS_S = 5.0  # a bucket charges by the request
_STORE_ANSWERS_S = 3.0  # one that takes longer is not well; its own time-outs are for large objects
_MARK = "flash/ready"  # a key that is never there; to be told so is enough


class Readiness:
    """Safe from several threads."""

    def __init__(self, database: Database, store: Store, stopping: threading.Event) -> None:
        self._database = database
        self._store = store
        self._stopping = stopping
        self._lock = threading.Lock()
        self._answers: dict[str, tuple[float, str]] = {}
        self._asking: threading.Thread | None = None  # the store, which has not answered yet

    def parts(self) -> dict[str, str]:
        """By part: "ok", or what is wrong."""
        return {
            "server": "stopping" if self._stopping.is_set() else "ok",
            "database": self._kept("database", _HOLDS_S, self._ask_database),
            "store": self._kept("store", _STORE_HOLDS_S, self._ask_store),
        }

    def _kept(self, part: str, holds_s: float, ask: Callable[[], str]) -> str:
        with self._lock:
            at, answer = self._answers.get(part, (0.0, ""))
            if not answer or time.monotonic() - at >= (holds_s if answer == "ok" else _HOLDS_S):
                answer = ask()
                self._answers[part] = (time.monotonic(), answer)
            return answer

    def _ask_database(self) -> str:
        try:
            with self._database.read() as connection:
                connection.execute(text("SELECT 1"))
        except SQLAlchemyError:
            return "can't be reached"
        return "ok"

    def _ask_store(self) -> str:
        said: list[str] = []

        def ask() -> None:
            try:
                self._store.size(_MARK)
            except FlashError:
                said.append("can't be reached")
            else:
                said.append("ok")

        if self._asking is None or not self._asking.is_alive():  # one question at a time, however long it takes
            self._asking = threading.Thread(target=ask, name="readiness", daemon=True)
            self._asking.start()
            self._asking.join(_STORE_ANSWERS_S)
        return said[0] if said else "does not answer"
