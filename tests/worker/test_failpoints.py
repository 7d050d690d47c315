"""Points to die at: off by default, counted, one attempt's alone, once where that is asked for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash
from flash.failpoints import NAMES, parse

LOOP = """
from flash.failpoints import failpoint
for at in range(5):
    print(at, flush=True)
    failpoint("trainer.step")
"""
MISSPELLED = ["trainer.stop:1", "trainer.step", "trainer.step:0", "trainer.step:1@x", "trainer.step=1"]


def run(**variables: str) -> tuple[int, int]:
    """Exit status, and how many rounds of the loop were begun."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLASH_")}
    done = subprocess.run(
        [sys.executable, "-c", LOOP], env={**environment, **variables}, capture_output=True, text=True, check=False
    )
    return done.returncode, len(done.stdout.split())


@pytest.mark.parametrize(
    ("variables", "ended"),
    [
        ({}, (0, 5)),
        ({"FLASH_FAILPOINTS": "trainer.step:3"}, (-9, 3)),
        ({"FLASH_FAILPOINTS": "trainer.job:1, trainer.step:9"}, (0, 5)),
        ({"FLASH_FAILPOINTS": "trainer.step:1", "FLASH_ATTEMPT_ID": "flash-1-aaaaaaaa.1"}, (-9, 1)),
        ({"FLASH_FAILPOINTS": "trainer.step:1", "FLASH_ATTEMPT_ID": "flash-1-aaaaaaaa.2"}, (0, 5)),
        ({"FLASH_FAILPOINTS": "trainer.step:2@2", "FLASH_ATTEMPT_ID": "flash-1-aaaaaaaa.2"}, (-9, 2)),
    ],
)
def test_a_process_dies_at_the_time_that_was_asked_for(variables: dict[str, str], ended: tuple[int, int]):
    assert run(**variables) == ended


def test_a_point_kills_once_where_a_folder_remembers(tmp_path: Path):
    variables = {"FLASH_FAILPOINTS": "trainer.step:2", "FLASH_FAILPOINTS_ONCE": str(tmp_path)}
    assert [run(**variables), run(**variables)] == [(-9, 2), (0, 5)]


def test_a_process_waits_where_a_file_says_so_and_then_goes_on(tmp_path: Path):
    hold = tmp_path / "hold"
    variables = {"FLASH_FAILPOINTS": "trainer.step:2", "FLASH_FAILPOINTS_HOLD": str(hold)}
    assert run(**variables) == (0, 5), "there is no such file"
    hold.touch()
    with subprocess.Popen(
        [sys.executable, "-c", LOOP], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        hold.unlink()
        assert process.stdout.read().split() == ["2", "3", "4"]
    assert process.returncode == 0


@pytest.mark.parametrize("text", MISSPELLED)
def test_a_misspelled_point_is_an_error(text: str):
    with pytest.raises(ValueError, match="known name"):
        parse(text)


def test_every_name_is_a_place_in_the_code_and_every_place_has_a_name():
    placed = set()
    for file in Path(flash.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                placed.add(ast.literal_eval(node.args[0]))
    assert placed == NAMES
