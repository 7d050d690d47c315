from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, make_url

from flash.storage import identity
from flash.storage.database import Database


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """Where an empty database is, or may be made; on Postgres its tables are there already."""
    if request.param == "postgres":
        found: URL = request.getfixturevalue("postgres_database")
        return found
    return make_url(f"sqlite:///{tmp_path / 'flash.db'}")


@pytest.fixture
def database(url: URL) -> Iterator[Database]:
    """On both databases."""
    yield from opened(url)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    yield from opened(make_url(f"sqlite:///{tmp_path / 'flash.db'}"))


def opened(url: URL) -> Iterator[Database]:
    found = Database(url)
    with found.write() as connection:
        identity.ensure_org(connection, "local")
        identity.ensure_org(connection, "other")
    yield found
    found.close()
