"""What holds for every example: rows from their generator, one config a run would take, no import but the SDK."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from freesolo.datasets import TaskExample
from nano.other_examples import ROWS
from nano.tasks import split_of_key, split_of_pair

from flash.config.load import parse_config
from flash.environments.loading import LocalEnvironment
from flash.environments.rewards import Response

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/environment.py"))


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    text = (EXAMPLES / name / "dataset" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_rows_are_what_the_generator_writes(name: str, split: Any) -> None:
    assert rows_of(name, split) == ROWS[name](split)


def test_letters_and_operands_stay_in_their_split() -> None:
    for split in ("train", "eval"):
        for row in rows_of("letters-thinking", split):
            letters = row["input"].removeprefix("Reverse the letters ")
            assert row["output"].split(" ") == letters.split(" ")[::-1]
            assert split_of_key(letters) == split
        for row in rows_of("calculator-agent", split):
            first, sign, second = row["metadata"]["call"].split(" ")
            assert split_of_pair(int(first), int(second)) == split
            assert int(row["output"]) == int(first) + (int(second) if sign == "+" else -int(second))
            assert row["metadata"]["call"] in row["input"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_config_is_taken_and_names_its_own_environment(folder: Path) -> None:
    files = sorted(folder.glob("*.toml"))
    assert files
    for file in files:
        config, warnings = parse_config(tomllib.loads(file.read_text(encoding="utf-8")))
        assert warnings == []
        assert (config.model, config.algorithm) == ("flash/nano", file.stem)
        assert config.environment.id == f"local/{folder.name}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_readme_shows_the_commands_for_its_own_folder(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"flash env push --name {folder.name} examples/{folder.name}" in text
    assert f"flash train examples/{folder.name}/grpo.toml" in text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_environment_needs_the_sdk_and_the_standard_library_only(folder: Path) -> None:
    nodes = list(ast.walk(ast.parse((folder / "environment.py").read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "freesolo"}


# --- letters-thinking --------------------------------------------------------------------------------------

LETTERS = TaskExample(record={}, input="Reverse the letters a b c d e", output="e d c b a")


@pytest.fixture
def letters(tmp_path: Path) -> Any:
    return LocalEnvironment(EXAMPLES / "letters-thinking", None, tmp_path).environment


@pytest.mark.parametrize("answer", ["e d c b a", " e d c b a\n"])
def test_the_letters_in_order_score(letters: Any, answer: str) -> None:
    assert letters.score_response(LETTERS, answer).score == 1.0


@pytest.mark.parametrize(
    "answer",
    ["", " ", "e d c b", "e d c b a a", "edcba", "e, d, c, b, a", "E D C B A", "e  d c b a", "a b c d e", "e d c b а"],
)
def test_everything_else_scores_nothing(letters: Any, answer: str) -> None:
    result = letters.score_response(LETTERS, answer)
    assert (result.score, result.error) == (0.0, None)


def test_the_trace_is_measured_and_never_scored(letters: Any) -> None:
    good = letters.score_response(LETTERS, Response("e d c b a", thinking="last e"))
    bad = letters.score_response(LETTERS, Response("", thinking="e d c b a"))
    assert (good.score, bad.score) == (1.0, 0.0)
    assert {metric.name: metric.score for metric in good.metrics}["thinking_characters"] == 6.0


@pytest.mark.parametrize("gold", [None, "", "edcba", "e d c b 1"])
def test_a_row_without_letters_is_an_error(letters: Any, gold: object) -> None:
    with pytest.raises(ValueError, match="fix the row's output"):
        letters.score_response(TaskExample(record={}, input="?", output=gold), "e d c b a")
