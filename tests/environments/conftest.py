"""Fixtures that write environment packages and load them in this process."""

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flash.environments.loading import LocalEnvironment

ECHO = """
    from freesolo.environments import EnvironmentSingleTurn, RewardResult

    class Echo(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, response_text):
            return RewardResult(score=float(response_text == example.output))

    def load_environment():
        return Echo()
"""


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write({"dataset/train.jsonl": text | bytes, ...}, code=...) makes a package and returns its folder."""

    def make(files: dict[str, str | bytes] | None = None, *, code: str = ECHO, name: str = "package") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        contents: dict[str, str | bytes] = {"environment.py": textwrap.dedent(code), **(files or {})}
        for path, content in contents.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return make


@pytest.fixture
def load(write: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., LocalEnvironment]]:
    """load(files, code=..., **params) writes a package and imports it; closed at the end of the test."""
    opened: list[LocalEnvironment] = []

    def make(files: dict[str, str | bytes] | None = None, *, code: str = ECHO, **params: Any) -> LocalEnvironment:
        folder = write(files, code=code, name=f"package-{len(opened)}")
        environment = LocalEnvironment(folder, params, tmp_path / f"work-{len(opened)}")
        opened.append(environment)
        return environment

    yield make
    for environment in opened:
        environment.close()
