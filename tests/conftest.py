"""What tests of several folders share: one Postgres a session, databases on it that are ready to use, a bucket, a
cluster."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
from sqlalchemy.engine import URL
from tests.team.postgres import Postgres

from flash.storage.database import Database

if TYPE_CHECKING:
    from torture.bucket import Bucket

# Servers of tests that train nothing need not load torch; those that do train begin without FLASH_ variables.
os.environ.setdefault("FLASH_SERVER_PRELOAD", "false")

# A shell starts what runs in its background with Ctrl-C ignored, which children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, nothing of what is tested.
hypothesis.settings.register_profile("flash", deadline=None)
hypothesis.settings.load_profile("flash")


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


@pytest.fixture(scope="module")
def team_bucket() -> Iterator[Bucket]:
    """A bucket of moto's, honest until told otherwise."""
    from torture.bucket import Bucket  # it brings moto along, which takes a second

    with Bucket(random.Random(0)) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def team_backing(postgres: Postgres, postgres_at_head: str, team_bucket: Bucket) -> Iterator[dict[str, str]]:
    """What a team's server keeps things in, as variables of its settings: Postgres, and a bucket."""
    name = postgres.create(template=postgres_at_head)
    options = {**team_bucket.options, "read_timeout": "30s"}  # on a busy machine
    yield {
        "FLASH_SERVER_DATABASE_URL": str(postgres.url(name)),
        "FLASH_SERVER_STORE_URL": team_bucket.url,
        "FLASH_SERVER_WORKER_STORE": "signed",
        "FLASH_SERVER_STORE_OPTIONS": ",".join(f"{key}={value}" for key, value in options.items()),
    }
    postgres.drop(name)


@pytest.fixture(scope="module")
def team_profile(team_backing: dict[str, str]) -> Iterator[dict[str, str]]:
    """The whole of a team's server, as variables of its settings: Postgres, a bucket, and Ray with two nodes."""
    from tests.team.cluster import Cluster

    with Cluster(OMP_NUM_THREADS="1") as cluster:
        for _ in range(2):
            cluster.add_node(cpus=1)
        yield {**team_backing, **cluster.settings}
