"""The arithmetic example stands alone, its gold answers score one, and no malformed answer scores."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from freesolo.datasets import TaskExample, load_dataset
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arithmetic_example_environment", FOLDER / "environment.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def environment(module: ModuleType) -> Any:
    return module.load_environment()


def row(output: object) -> TaskExample:
    return TaskExample(record={}, input="What is 5 + 7?", output=output)


def score(environment: Any, answer: str, gold: object = "12") -> float:
    return float(environment.score_response(row(gold), answer).score)


@pytest.mark.parametrize("answer", ["12", " 12", "12\n", "\t12 \r\n"])
def test_the_number_alone_scores(environment: Any, answer: str) -> None:
    assert score(environment, answer) == 1.0


MALFORMED = [
    "",
    " ",
    "\n",
    "twelve",
    "12 or 13",
    "13 or 12",
    "11, 12, 13",
    "12 12",
    "1 2",
    "12.",
    "12.0",
    "12,0",
    "1,2",
    "1.2e1",
    "0x0c",
    "0b1100",
    "012",
    "+12",
    "--12",
    "12-",
    "12!",
    "=12",
    "5 + 7 = 12",
    "The answer is 12",
    "**12**",
    "`12`",
    '"12"',
    "{'answer': 12}",
    "１２",
    "١٢",
    "①②",
    "12\u200b",
    "\u00a012",
    "12\x00",
    "12\n13",
    "12<|im_end|>",
    "<think>12",
    "<think>\n12\n</think>\n\n12",
    "1_2",
    "nan",
    "inf",
    "-12",
    "-0",
    "9" * 5000,
    "12" + "0" * 100_000,
]


@pytest.mark.parametrize("answer", MALFORMED, ids=lambda text: ascii(text[:20]))
def test_malformed_answers_score_nothing(environment: Any, answer: str) -> None:
    result = environment.score_response(row("12"), answer)
    assert (result.score, result.success, result.error) == (0.0, False, None)


@given(answer=st.text())
def test_no_text_but_the_number_scores(environment: Any, answer: str) -> None:
    assert score(environment, answer) == float(answer.strip(" \t\r\n") == "12")


@given(number=st.integers(min_value=-(10**9) + 1, max_value=10**9 - 1))
def test_every_whole_number_in_range_reads_as_itself(module: ModuleType, number: int) -> None:
    assert module.parse_answer(str(number)) == number


def test_zero_and_negative_gold_answers_work(environment: Any) -> None:
    assert score(environment, "0", gold="0") == 1.0
    assert score(environment, "-3", gold="-3") == 1.0
    assert score(environment, "3", gold="-3") == 0.0


def test_a_gold_answer_written_as_a_number_works(environment: Any) -> None:
    assert score(environment, "12", gold=12) == 1.0


@pytest.mark.parametrize("gold", [None, "", "twelve", "12.0", [12]])
def test_a_row_without_a_usable_gold_answer_is_an_error(environment: Any, gold: object) -> None:
    with pytest.raises(ValueError, match="fix the row's output"):
        score(environment, "12", gold=gold)


def test_a_well_formed_wrong_answer_is_told_from_a_malformed_one(environment: Any) -> None:
    wrong = environment.score_response(row("12"), "13")
    malformed = environment.score_response(row("12"), "thirteen")
    assert [wrong.metrics[0].score, malformed.metrics[0].score] == [1.0, 0.0]
    assert wrong.reason != malformed.reason


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_gold_answer_scores_one_through_the_group_hook(environment: Any, split: str) -> None:
    for example in load_dataset(FOLDER / "dataset" / f"{split}.jsonl").examples:
        completion = environment.sft_completion(example)
        assert [message["role"] for message in completion] == ["assistant"]
        scores = environment.score_responses(example, [completion[0]["content"], "no"])
        assert [result.score for result in scores] == [1.0, 0.0]
        if example.id and example.id.endswith("200"):
            break


def test_the_prompt_is_the_question_alone(environment: Any) -> None:
    assert environment.start_episode(row("12"), "") == [{"role": "user", "content": "What is 5 + 7?"}]


def test_rows_hold_input_output_and_metadata_only() -> None:
    for split in ("train", "eval"):
        path = FOLDER / "dataset" / f"{split}.jsonl"
        assert path.stat().st_size < 500_000
        for line in path.read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"input", "output", "metadata"}


def test_the_folder_depends_on_the_standard_library_and_the_sdk_only() -> None:
    tree = ast.parse((FOLDER / "environment.py").read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {*sys.stdlib_module_names, "freesolo"}


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_both_configs_name_the_model_and_the_pushed_environment(algorithm: str) -> None:
    config = tomllib.loads((FOLDER / f"{algorithm}.toml").read_text(encoding="utf-8"))
    assert config["model"] == "flash/nano"
    assert config.get("algorithm", "sft") == algorithm
    assert config["environment"]["id"] == "local/arithmetic"
