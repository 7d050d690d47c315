"""A real Postgres for tests: its own cluster in a temporary folder, on a free port of 127.0.0.1.

The server's programs are Debian's package `postgresql` (or any others found); it refuses to run as root, so then it
runs as the user `postgres` that the package made.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.engine import URL

USER = "flash"


def programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


class Postgres:
    """Start it with `with`; `stop` and `start` again keep port and data."""

    def __init__(self) -> None:
        folder = programs()
        assert folder is not None, "no Postgres here: install Debian's `postgresql`"
        self._programs = folder
        self._owner = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="flash-postgres-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    def __enter__(self) -> Postgres:
        if self._owner:
            entry = pwd.getpwnam(self._owner)
            os.chown(self._folder, entry.pw_uid, entry.pw_gid)
        self._run("initdb", "-D", "data", "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        # No fsync: these data outlive a killed process, and no test pulls the plug.
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self._folder} -c fsync=off -c max_connections=200"
        self._run("pg_ctl", "start", "-D", "data", "-w", "-s", "-l", "log", "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is its kill -9: sessions are cut, and it recovers from its log when it starts again."""
        self._run("pg_ctl", "stop", "-D", "data", "-s", "-m", mode)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], cwd=self._folder, user=self._owner, group=self._owner,
            extra_groups=[] if self._owner else None, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, timeout=120, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stderr}"

    def url(self, database: str) -> URL:
        return URL.create("postgresql", username=USER, host="127.0.0.1", port=self.port, database=database)

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        with psycopg.connect(host="127.0.0.1", port=self.port, user=USER, dbname=database, autocommit=True) as session:
            done = session.execute(statement.encode())
            return done.fetchall() if done.description else []

    def create(self, template: str | None = None) -> str:
        """A new database's name."""
        name = f"t{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
