from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flash.errors import ConfigError

MINIMAL = 'model = "flash/nano"\n[environment]\nid = "acme/arithmetic"\n'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FLASH_HOME, so that the catalog is the shipped one."""
    folder = tmp_path / "flash-home"
    folder.mkdir()
    monkeypatch.setenv("FLASH_HOME", str(folder))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config file; without text, a minimal valid one."""

    def write(text: str = MINIMAL, name: str = "config.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def problems() -> Callable[[Callable[[], object]], list[str]]:
    """The problem lines that a call is refused with."""

    def problems(call: Callable[[], object]) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value).split("\n") == caught.value.problems, "a problem must be one line"
        return caught.value.problems

    return problems
