"""Every schema that was ever released grows into today's, with what is in it, on both databases."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, create_engine, insert, select, text
from sqlalchemy.engine import URL, make_url

from flash.errors import Conflict
from flash.records import RunState
from flash.storage import events, identity, migrations, runs, schema, shares
from flash.storage.database import Database, normal_url

RELEASED = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008")
KEY = "fslo_a-key-of-those-days"
RUN = "flash-1700000000-0a0b0c0d"


def config(connection: Connection | None = None) -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(migrations.__file__).parent))
    made.attributes["connection"] = connection
    return made


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        yield make_url(f"sqlite:///{tmp_path / 'flash.db'}")
        return
    postgres = request.getfixturevalue("postgres")
    name = postgres.create()
    yield postgres.url(name)
    postgres.drop(name)


def build(url: URL, revision: str) -> None:
    """The database as a release with that schema left it, with a run of its time."""
    engine = create_engine(normal_url(url))
    with engine.begin() as connection:
        command.upgrade(config(connection), revision)
        then = MetaData()
        then.reflect(connection)
        fill(connection, then)
    engine.dispose()


def fill(connection: Connection, then: MetaData) -> None:
    def add(table: str, **values: Any) -> None:
        connection.execute(insert(then.tables[table]).values(**values))

    sha256 = hashlib.sha256(KEY.encode()).hexdigest()
    add("orgs", id="local", created_at=1.0)
    add("api_keys", sha256=sha256, org_id="local", name="k", role="owner", created_at=1.0)
    add(
        "runs", id=RUN, org_id="local", created_at=5.0, updated_at=6.0, config="{}", spec='{"model":"flash/nano"}',
        seed=7, environment_namespace="local", environment_name="e", environment_sha256="a" * 64, desired="run",
        state="queued", step=0, metrics='{"loss":1.5}', warnings="[]", last_seq=1, active_s=0.0, fruitless=0,
        micro_batch_divisor=1,
    )  # fmt: skip
    add("events", run_id=RUN, seq=1, time=5.0, kind="state", data='{"from":null,"to":"queued","reason":"submitted"}')
    add("submissions", org_id="local", key="k", body_mac="m", run_id=RUN, created_at=5.0)
    add("secrets", run_id=RUN, name="S", sealed=b"sealed")


def test_the_list_of_releases_is_whole():
    known = [found.revision for found in ScriptDirectory.from_config(config()).walk_revisions()]
    assert sorted(known) == sorted(RELEASED) and max(RELEASED) == migrations.HEAD


@pytest.mark.parametrize("revision", RELEASED)
def test_it_grows_into_todays_with_what_is_in_it(empty: URL, revision: str):
    build(empty, revision)
    database = Database(empty)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        run = runs.get_run(connection, RUN, org="local")
        assert (run.state, run.seed, run.metrics) == (RunState.QUEUED, 7, {"loss": 1.5})
        assert (run.pinned, run.gpus, run.key_id, run.priority) == (False, 0, None, 0)
        assert shares.standings(connection) == {"local": shares.Standing(share=1.0, turn=0.0)}
        assert [event.data["to"] for event in events.read(connection, RUN)] == ["queued"]
        caller = identity.find_caller(connection, KEY)
        assert caller is not None and (caller.org, caller.role.word) == ("local", "owner")
        assert runs.find_submission(connection, org="local", key="k", body_mac="m") == RUN
        assert connection.execute(select(schema.secrets.c.sealed)).scalar() == b"sealed"
    with database.write() as connection:  # and life goes on
        assert runs.insert_attempt(connection, RUN, 1, device="cpu", work_dir="/w", now=9.0)
    database.close()


def test_a_database_of_a_later_version_is_refused_in_one_line(empty: URL):
    Database(empty).close()
    engine = create_engine(normal_url(empty))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(Conflict, match="revision 9999, which this version does not know"):
        Database(empty)
