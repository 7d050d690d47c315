"""The database: writers that take turns, readers that see one moment, migrations at start-up.

Owns connections, transactions and the clock that goes with them. On SQLite a single connection of a single process
writes, behind a lock, and readers are opened read-only: versions up to 3.51.2 can corrupt a write-ahead log that two
connections reset at once, and Python often links one of those. On Postgres several servers write, and an advisory
lock makes their transactions take turns just so, except that those about different runs go side by side: code that
looks and then writes is right on both. Knows nothing of runs but their ids; `on_commit` listeners learn which runs a
transaction touched.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from flash.errors import Conflict, InvalidInput, Unavailable
from flash.storage.migrations import HEAD

_BUSY_TIMEOUT_MS = 10_000
_TOUCHED = "flash_touched_runs"  # key in Connection.info

SQLITE_VERSION = sqlite3.sqlite_version


class Database:
    """Open it once per process. `write()` and `read()` yield connections inside a transaction.

    `shared`: other servers may write too. Raises InvalidInput for a URL that is no database of ours, Unavailable
    when the database can't be reached, Conflict when another process has the SQLite file.
    """

    def __init__(self, url: str | URL) -> None:
        self.url = normal_url(url)
        self._lock = threading.RLock()
        self._listeners: list[Callable[[set[str]], None]] = []
        self._process_lock: int | None = None
        self._offset: float | None = None  # of Postgres' clock against this process's monotonic one
        self.shared = self.url.get_backend_name() != "sqlite"
        if self.shared:
            self._writer, self._reader = _open_postgres(self.url)
        else:
            self._writer, self._reader = self._open_sqlite(self.url)
        try:
            self._migrate()
        except DBAPIError as error:
            self.close()
            reason = " ".join(str(error.orig).split())[:300]
            raise Unavailable(f"the database at {self.url} can't be used: {reason}", remedy=_REACH) from None

    def _open_sqlite(self, url: URL) -> tuple[Engine, Engine]:
        path = Path(url.database or "")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._process_lock = _lock_process(path)
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        writer = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
        _prepare_sqlite(writer, begin="BEGIN IMMEDIATE", writer=True)
        read_only = f"file:{quote(str(path))}?mode=ro"

        def connect() -> sqlite3.Connection:
            return sqlite3.connect(read_only, uri=True, check_same_thread=False)

        reader = create_engine(
            "sqlite://", creator=connect, poolclass=QueuePool, pool_size=8, max_overflow=32
        )
        _prepare_sqlite(reader, begin="BEGIN", writer=False)
        return writer, reader

    def _migrate(self) -> None:
        """Upgrades to the newest schema; Alembic is imported only where there is something to do."""
        with self.write() as connection:
            if _revision(connection) == HEAD:
                return
            from alembic import command
            from alembic.config import Config
            from alembic.util import CommandError

            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise Conflict(
                    f"the database is at revision {_revision(connection)}, which this version does not know",
                    remedy="use the version of Flash that wrote it, or a newer one",
                ) from error

    @contextmanager
    def write(self, *, about: str | None = None) -> Iterator[Connection]:
        """A transaction that may write: committed when the block ends, rolled back when it raises.

        `about` names the one run whose rows it looks at and changes, so that it need not wait for transactions
        about other runs where the database can do without. Never open one inside another.
        """
        touched: set[str] = set()
        with self._exclusive(), self._writer.begin() as connection:
            connection.info[_TOUCHED] = touched
            if self.shared:
                self._take_turn(connection, about)
            yield connection
        for listener in self._listeners if touched else ():
            listener(touched)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self.shared:
            yield
            return
        with self._lock:
            yield

    def _take_turn(self, connection: Connection, about: str | None) -> None:
        """Waits for this transaction's turn, and learns Postgres' time on the way."""
        from flash.storage import postgres

        mode = "" if about is None else "_shared"
        self._learn_time(connection, f"pg_advisory_xact_lock{mode}({_pair(postgres.EVERYTHING)})")
        if about is not None:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_pair(postgres.run_lock(about))})")

    def _learn_time(self, connection: Connection, first: str = "NULL") -> None:
        asked = f"SELECT {first}, extract(epoch FROM clock_timestamp())::float8"
        self._offset = float(connection.exec_driver_sql(asked).one()[1]) - time.monotonic()

    def clock(self) -> float:
        """UTC seconds: of Postgres' clock, so that servers agree, as it was learned with this process's last write."""
        if not self.shared:
            return time.time()
        if self._offset is None:
            with self.read() as connection:
                self._learn_time(connection)
        assert self._offset is not None
        return time.monotonic() + self._offset

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A snapshot: several selects inside one block see the same moment."""
        with self._reader.connect() as connection, connection.begin():
            yield connection

    def on_commit(self, listener: Callable[[set[str]], None]) -> None:
        """`listener(run_ids)` is called after each commit that touched runs, on the writing thread."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Readers first: the last connection to close checkpoints the log, and that must be the writer."""
        self._reader.dispose()
        self._writer.dispose()
        if self._process_lock is not None:
            os.close(self._process_lock)
            self._process_lock = None


_REACH = "check the address, the password and that it runs"


def normal_url(url: str | URL) -> URL:
    """The URL with our driver for Postgres; InvalidInput for anything but SQLite and Postgres."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidInput("the database's URL can't be read", remedy=_FORM) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise InvalidInput(f"{parsed.drivername!r} is no database that Flash knows", remedy=_FORM)
    return parsed


_FORM = "write postgresql://user:password@host/name, or sqlite:////path/to/flash.db"


def _open_postgres(url: URL) -> tuple[Engine, Engine]:
    try:
        from flash.storage import postgres
    except ImportError:
        raise InvalidInput(
            "the driver for Postgres is not installed", remedy="pip install 'flash-lora[postgres]'"
        ) from None
    writer = postgres.open_engine(url)
    reader = writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return writer, reader


def _pair(lock: tuple[int, int]) -> str:
    return f"{lock[0]}, {lock[1]}"


def touch(connection: Connection, run_id: str) -> None:
    """Marks a run as changed by this transaction (see `Database.on_commit`)."""
    connection.info.setdefault(_TOUCHED, set()).add(run_id)


def _lock_process(path: Path) -> int:
    """Holds `<database>.lock` for the life of this process; a second writer process is refused."""
    descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(
            f"{path} is in use by another Flash server", remedy="stop it with `flash server stop`"
        ) from None
    return descriptor


def _prepare_sqlite(engine: Engine, *, begin: str, writer: bool) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the driver's implicit BEGIN comes too late for snapshots
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA mmap_size = 0")
        if writer:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.execute("PRAGMA secure_delete = ON")  # a deleted secret leaves no bytes in free pages
        cursor.close()

    @event.listens_for(engine, "begin")
    def open_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)
