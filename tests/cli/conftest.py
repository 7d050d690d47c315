"""The real `flash` command, in this process for speed or as a process of its own where that matters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flash.cli.main import app

CONFIG = """
model = "flash/nano"
[environment]
id = "local/arithmetic"
[train]
epochs = 3
"""

Flash = Callable[..., Result]


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch) -> Path:
    """An empty FLASH_HOME, and no server or key from the caller's own environment."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FLASH_HOME", str(folder))
    for name in ("FLASH_API_URL", "FREESOLO_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def flash() -> Flash:
    """`flash("train", ...)` in this process; piped, as the runner's streams are no terminal."""

    def call(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(each) for each in arguments], input=input, prog_name="flash")

    return call


@pytest.fixture
def flash_process(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`flash` as its own process."""

    def call(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flash.cli.main", *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, timeout=60, **options,
        )  # fmt: skip

    return call
