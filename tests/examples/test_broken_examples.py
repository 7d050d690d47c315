"""A copy of every example, broken in one place: `flash env check` names the fault that a run would have met."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flash.environments.checking import check, gold_text
from flash.environments.loading import LocalEnvironment
from flash.environments.package import pack, unpack
from flash.environments.protocol import FinishedEpisode
from flash.errors import FlashError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/environment.py"))
KEPT_ROWS = 20  # of each file: the rest would only take time


def test_there_are_examples() -> None:
    assert FOLDERS


# --- faults --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """How a copy is broken, and a part of what must be said of it."""

    says: str
    breaks: Callable[[Path], None] = lambda folder: None
    params: tuple[tuple[str, Any], ...] = ()


def in_code(text: str) -> Callable[[Path], None]:
    """More code at the end of environment.py."""

    def add(folder: Path) -> None:
        with (folder / "environment.py").open("a") as file:
            file.write(f"\n{text}\n")

    return add


def in_row(number: int, text: str) -> Callable[[Path], None]:
    """Another text in the place of a line of the training rows, counted from 1."""

    def replace(folder: Path) -> None:
        path = folder / "dataset" / "train.jsonl"
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n")

    return replace


def in_hooks(names: tuple[str, ...], body: str) -> Callable[[Path], None]:
    """Other hooks in the environment that the factory makes, whatever else that is."""
    lines = [
        "_original_factory = load_environment",
        "def load_environment(*args, **kwargs):",
        "    made = _original_factory(*args, **kwargs)",
        f"    def broken(*args, **kwargs): {body}",
        *(f"    if hasattr(made, {name!r}): made.{name} = broken" for name in names),
        "    return made",
    ]
    return in_code("\n".join(lines))


def without_rows(folder: Path) -> None:
    (folder / "dataset" / "train.jsonl").write_text("")


REWARDS = ("score_response", "score_responses", "score_episode", "score_episodes")
FAULTS = {
    "a syntax error": Fault("invalid syntax", in_code("def (")),
    "a missing module": Fault("no_such_module_anywhere", in_code("import no_such_module_anywhere")),
    "no factory": Fault("load_environment", in_code("del load_environment")),
    "a factory that raises": Fault("KeyError", in_code("def load_environment(): raise KeyError('lost')")),
    "a factory that returns nothing": Fault("load_environment", in_code("def load_environment(): return None")),
    "an exit": Fault("sys.exit", in_code("raise SystemExit(2)")),
    "a row without input": Fault("line 3", in_row(3, '{"output": "x"}')),
    "a row that is no JSON": Fault("line 2", in_row(2, '{"input": ')),
    "a row that is no object": Fault("line 4", in_row(4, "17")),
    "no rows": Fault("no rows", without_rows),
    "a split that is missing": Fault("'nowhere' is missing", params=(("split", "nowhere"),)),
    "a parameter that nobody takes": Fault("surplus", params=(("surplus", 1),)),
    "an opening that raises": Fault("ZeroDivisionError", in_hooks(("start_episode",), "return 1 / 0")),
    "an opening that is no list": Fault("start_episode", in_hooks(("start_episode",), "return 'hello'")),
    "a target that raises": Fault("LookupError", in_hooks(("sft_completion",), "raise LookupError('gold')")),
    "a reward that raises": Fault("RuntimeError: the judge", in_hooks(REWARDS, "raise RuntimeError('the judge')")),
    "a reward that is nothing": Fault("scoring returned NoneType", in_hooks(REWARDS, "return None")),
}


# --- what a run meets ------------------------------------------------------------------------------------


def met_by_a_run(folder: Path, params: dict[str, Any], work_dir: Path) -> str:
    """The first error on a run's way: the package, its rows, prompts and targets, then a group's rewards."""
    try:
        unpack(pack(folder).data, work_dir / "opened")
        environment = LocalEnvironment(work_dir / "opened", params, work_dir)
        try:
            split = environment.rows().split
            [target] = environment.targets(split, [0])
            environment.start(split, [0], seed=0)
            text = gold_text(target)
            messages = [*target.prompt, {"role": "assistant", "content": text}]
            [score] = environment.score(split, 0, [FinishedEpisode(messages, text)], seed=0)
            return score.error or ""
        finally:
            environment.close()
    except FlashError as error:
        return error.message


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of an example with a few of its rows."""

    def make(example: Path) -> Path:
        folder = tmp_path / example.name
        shutil.copytree(example, folder)
        for path in (folder / "dataset").glob("*.jsonl"):
            path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:KEPT_ROWS]))
        return folder

    return make


@pytest.mark.parametrize("example", FOLDERS, ids=lambda path: path.name)
def test_a_copy_that_is_whole_is_sound(example: Path, copy, tmp_path: Path) -> None:
    folder = copy(example)
    assert check(folder).problems == []
    (tmp_path / "run").mkdir()
    assert met_by_a_run(folder, {}, tmp_path / "run") == ""


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("example", FOLDERS, ids=lambda path: path.name)
def test_check_names_the_fault_that_a_run_would_have_met(example: Path, name: str, copy, tmp_path: Path) -> None:
    fault, folder = FAULTS[name], copy(example)
    fault.breaks(folder)
    (tmp_path / "run").mkdir()
    met = met_by_a_run(folder, dict(fault.params), tmp_path / "run")
    problems = check(folder, dict(fault.params)).problems
    assert fault.says in met
    assert any(met in problem for problem in problems), (met, problems)
    assert all("\n" not in problem for problem in problems)
