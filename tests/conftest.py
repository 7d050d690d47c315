"""What tests of several folders share: one Postgres a session, and databases on it that are ready to use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import URL
from tests.team.postgres import Postgres

from flash.storage.database import Database


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_at_head(postgres: Postgres) -> str:
    """A database with every table, to copy: migrating one for each test would take longer than the tests."""
    name = postgres.create()
    Database(postgres.url(name)).close()
    return name


@pytest.fixture
def postgres_database(postgres: Postgres, postgres_at_head: str) -> Iterator[URL]:
    """The URL of a database of one's own, at head."""
    name = postgres.create(template=postgres_at_head)
    yield postgres.url(name)
    postgres.drop(name)
