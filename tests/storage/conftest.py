from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flash.storage import identity
from flash.storage.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'flash.db'}")
    with opened.write() as connection:
        identity.ensure_org(connection, "local")
        identity.ensure_org(connection, "other")
    yield opened
    opened.close()
