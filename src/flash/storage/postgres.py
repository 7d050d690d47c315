"""Postgres' own part of the database: connecting, what its text can't hold, locks that only take turns.

Owns the driver's settings and the numbers of the advisory locks. `Database` and `Leader` are built on it; nothing
else knows which database there is. Imported only where the URL asks for Postgres, since the driver is an extra.
"""

from __future__ import annotations

import zlib
from typing import Any

import psycopg
from psycopg.types.string import StrDumper
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL

# Advisory locks are pairs of numbers; the first says what the second is about.
EVERYTHING = (0x464C53, 0)  # shared by writers of one run each, exclusive for every other writer
RUNS = 0x464C54
LEADER = (0x464C55, 0)

# A dead network must not hold a request for the kernel's quarter of an hour, nor a server that was stopped in the
# middle of a transaction hold up the others for ever.
_CONNECT = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms
    "application_name": "flash",
}
_SESSION = (
    "SET idle_in_transaction_session_timeout = '30s'",
    "SET lock_timeout = '30s'",
    "SET TIME ZONE 'UTC'",
)


class _Text(StrDumper):
    """Postgres' text can't hold NUL, which SQLite's can; no name or message means anything by it."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", ""))


def connect_arguments(url: URL) -> dict[str, Any]:
    """What the URL leaves open."""
    return {name: value for name, value in _CONNECT.items() if name not in url.query}


def open_engine(url: URL) -> Engine:
    """A pool for the many threads of a server; a connection that a restarted Postgres has dropped is replaced."""
    engine = create_engine(
        url, pool_pre_ping=True, pool_size=10, max_overflow=40, pool_timeout=20, connect_args=connect_arguments(url)
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: psycopg.Connection[Any], _record: Any) -> None:
        connection.adapters.register_dumper(str, _Text)
        with connection.transaction():
            for statement in _SESSION:
                connection.execute(statement)

    return engine


def run_lock(run_id: str) -> tuple[int, int]:
    """The lock of one run. Two runs with one number only take turns where they need not."""
    return RUNS, zlib.crc32(run_id.encode()) - 2**31


SESSION_ERRORS = (psycopg.Error, OSError)


class Session:
    """A session of one's own, for a lock that is held from one transaction to the next.

    Postgres ends it, and frees its locks, when it was silent for `silent_s`. Raises `SESSION_ERRORS`.
    """

    def __init__(self, url: URL, *, silent_s: float) -> None:
        plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection = psycopg.connect(plain, autocommit=True, **connect_arguments(url))
        # The server's end too: a machine that is gone says no goodbye.
        for name, value in (
            ("idle_session_timeout", f"{int(silent_s * 1000)}ms"),
            ("tcp_keepalives_idle", str(max(1, int(silent_s / 3)))),
            ("tcp_keepalives_interval", str(max(1, int(silent_s / 6)))),
            ("tcp_keepalives_count", "3"),
        ):
            self._connection.execute("SELECT set_config(%s, %s, false)", (name, value))

    def try_lock(self, lock: tuple[int, int]) -> bool:
        """Whether the lock is this session's now. Never waits."""
        row = self._connection.execute("SELECT pg_try_advisory_lock(%s::int, %s::int)", lock).fetchone()
        return row is not None and bool(row[0])

    def ping(self) -> None:
        self._connection.execute("SELECT 1")

    def close(self) -> None:
        self._connection.close()
