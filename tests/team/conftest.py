from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.team.worlds import Team


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def open_team(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Team]]:
    """`open_team(**settings)`: a plane with orgs, on both databases."""
    with ExitStack() as opened:

        def make(**settings: Any) -> Team:
            if request.param == "postgres":
                settings["database_url"] = str(request.getfixturevalue("postgres_database"))
            return opened.enter_context(Team(tmp_path / "home", **settings))

        yield make


@pytest.fixture
def team(open_team: Callable[..., Team]) -> Team:
    return open_team()
