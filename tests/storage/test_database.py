"""The database's promises: one writer, snapshots, durability, a schema that the migrations build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, insert, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from flash.errors import Conflict
from flash.storage import migrations, schema
from flash.storage.database import Database, touch


def test_migrations_build_exactly_the_tables_that_the_code_uses(database: Database):
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_head_names_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]


def test_opening_a_database_at_head_imports_no_alembic(sqlite: Database, tmp_path: Path):
    sqlite.close()
    code = f"""
        import sys
        from flash.storage.database import Database
        Database("sqlite:///{tmp_path}/flash.db").close()
        assert not [name for name in sys.modules if name.startswith("alembic")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_second_process_is_refused_and_the_first_goes_on(sqlite: Database, tmp_path: Path):
    with pytest.raises(Conflict, match="another Flash server"):
        Database(f"sqlite:///{tmp_path / 'flash.db'}")
    with sqlite.read() as connection:
        assert connection.execute(select(func.count()).select_from(schema.orgs)).scalar() == 2


def test_the_database_file_is_its_owners_only(sqlite: Database, tmp_path: Path):
    assert (tmp_path / "flash.db").stat().st_mode & 0o077 == 0


def test_it_writes_through_to_the_disk_in_a_write_ahead_log(sqlite: Database):
    with sqlite.write() as connection:
        settings = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]


@pytest.mark.parametrize("folder", ["with space", "100%25#1", "ünï"])
def test_a_home_may_have_any_name(tmp_path: Path, folder: str):
    opened = Database(URL.create("sqlite", database=str(tmp_path / folder / "flash.db")))
    with opened.write() as connection:
        connection.execute(insert(schema.orgs).values(id="x", created_at=0.0))
    with opened.read() as connection:
        assert connection.execute(select(schema.orgs.c.id)).scalars().all() == ["x"]
    opened.close()
    assert (tmp_path / folder / "flash.db").stat().st_size > 0


def test_readers_can_not_write(sqlite: Database):
    with pytest.raises(OperationalError, match="readonly"), sqlite.read() as connection:
        connection.execute(insert(schema.orgs).values(id="x", created_at=0.0))


def test_a_block_that_raises_leaves_nothing_and_tells_no_one(database: Database):
    told: list[set[str]] = []
    database.on_commit(told.append)
    with pytest.raises(RuntimeError), database.write() as connection:
        connection.execute(insert(schema.orgs).values(id="x", created_at=0.0))
        touch(connection, "run")
        raise RuntimeError
    with database.write() as connection:
        assert connection.execute(select(schema.orgs).where(schema.orgs.c.id == "x")).first() is None
        touch(connection, "other-run")
    assert told == [{"other-run"}]


def test_a_reader_sees_one_moment(database: Database):
    count = select(func.count()).select_from(schema.orgs)
    with database.read() as reader:
        before = reader.execute(count).scalar()
        with database.write() as writer:
            writer.execute(insert(schema.orgs).values(id="x", created_at=0.0))
        assert reader.execute(count).scalar() == before
    with database.read() as reader:
        assert reader.execute(count).scalar() == before + 1


def test_writers_on_many_threads_take_turns(database: Database):
    def add(worker: int) -> None:
        for number in range(20):
            with database.write() as connection:
                connection.execute(insert(schema.orgs).values(id=f"{worker}-{number}", created_at=0.0))

    threads = [threading.Thread(target=add, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(schema.orgs)).scalar() == 2 + 80


def test_what_was_committed_survives_kill_9_and_what_was_not_is_gone(url: URL):
    code = f"""
        import sys, time
        from sqlalchemy import insert
        from flash.storage import schema
        from flash.storage.database import Database
        database = Database("{url.render_as_string(hide_password=False)}")
        with database.write() as connection:
            connection.execute(insert(schema.orgs).values(id="committed", created_at=0.0))
        with database.write() as connection:
            connection.execute(insert(schema.orgs).values(id="open", created_at=0.0))
            print("ready", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    database = Database(url)
    with database.read() as connection:
        assert connection.execute(select(schema.orgs.c.id)).scalars().all() == ["committed"]
    database.close()


def test_json_columns_take_what_no_database_would(database: Database):
    value = {"nan": float("nan"), "list": [float("inf"), 1.5], "text": "a\0b\ud800", "nested": {"ü": None}}
    with database.write() as connection:
        row = {"namespace": "n", "name": "m", "sha256": "s", "org_id": "local", "size": 1, "created_at": 0.0}
        connection.execute(insert(schema.environment_versions).values(**row, push=1, files=value))
        stored = connection.execute(select(schema.environment_versions.c.files)).scalar()
    assert stored == {"nan": None, "list": [None, 1.5], "text": "a\0b?", "nested": {"ü": None}}
