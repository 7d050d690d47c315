"""The tasks are right, and base, training and held-out rows never share an operand pair."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from nano.arithmetic_example import rows
from nano.tasks import (
    addition_trace,
    arithmetic_tasks,
    hasty_difference,
    hasty_sum,
    operand_pairs,
    split_of_pair,
    subtraction_trace,
    task_of_kind,
)
from nano.train import MIXTURE

DATASET = Path(__file__).resolve().parents[2] / "examples" / "arithmetic" / "dataset"


def operands(question: str) -> tuple[int, int]:
    first, second = re.findall(r"[0-9]+", question)
    return int(first), int(second)


def committed(split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DATASET / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_two_digit_pair_is_in_exactly_one_split() -> None:
    splits = [set(operand_pairs(split)) for split in ("base", "train", "eval")]
    assert sum(len(pairs) for pairs in splits) == 90 * 90 == len(set.union(*splits))
    assert all(len(pairs) > 1000 for pairs in splits)


def test_a_pair_keeps_its_split_when_turned_round() -> None:
    assert all(split_of_pair(a, b) == split_of_pair(b, a) for a in range(10, 100) for b in range(10, 100))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_committed_rows_stay_on_their_side_of_the_split(split: str) -> None:
    assert {split_of_pair(*operands(str(row["input"]))) for row in committed(split)} == {split}


def test_the_base_draws_arithmetic_from_its_own_pairs_only() -> None:
    rng = random.Random(1)
    pairs = operand_pairs("base")
    drawn = [MIXTURE.draw("base", rng, pairs) for _ in range(2000)]
    arithmetic = [task for task in drawn if task.kind in ("addition", "subtraction", "word")]
    assert len(arithmetic) > 500
    assert {split_of_pair(*operands(task.question)) for task in arithmetic} == {"base"}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_committed_rows_are_what_the_script_writes(split: str) -> None:
    assert committed(split) == rows(split)


def test_evaluation_has_at_least_500_distinct_rows_of_three_kinds() -> None:
    held_out = committed("eval")
    assert len({row["input"] for row in held_out}) == len(held_out) >= 500
    assert {row["metadata"]["kind"] for row in held_out} == {"addition", "subtraction", "word"}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_gold_answers_are_right(split: str) -> None:
    for row in committed(split):
        question = str(row["input"])
        a, b = operands(question)
        difference = "-" in question or "gives away" in question
        assert row["output"] == str(a - b if difference else a + b)


def test_traces_end_in_the_digits_of_the_answer() -> None:
    for a in range(10, 100):
        for b in range(10, 100):
            ones, tens = (int(line.split("=")[1]) for line in addition_trace(a, b).splitlines())
            assert tens * 10 + ones % 10 == a + b
            if a >= b:
                ones, tens = (int(line.split("=")[1]) for line in subtraction_trace(a, b).splitlines())
                assert tens * 10 + ones == a - b


def test_hasty_answers_are_right_often_enough_for_eight_samples_to_find_it() -> None:
    rng = random.Random(0)
    for a, b in [(47, 38), (60, 70), (99, 99), (12, 13), (82, 35), (91, 10)]:
        sums = [hasty_sum(a, b, rng) == a + b for _ in range(2000)]
        differences = [hasty_difference(max(a, b), min(a, b), rng) == abs(a - b) for _ in range(2000)]
        assert 0.2 < sum(sums) / 2000 < 0.95
        assert 0.2 < sum(differences) / 2000 < 0.95


def test_hasty_answers_miss_most_sums_that_carry() -> None:
    rng = random.Random(0)
    assert sum(hasty_sum(47, 38, rng) == 75 for _ in range(1000)) > 500


def test_asking_for_more_distinct_tasks_than_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="distinct addition tasks"):
        arithmetic_tasks("eval", "addition", 5000, random.Random(0))


@pytest.mark.parametrize("kind", ["string", "json", "tool", "guess", "greeting"])
def test_text_tasks_come_with_a_question_an_answer_and_a_trace(kind: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        task = task_of_kind(kind, "base", rng)
        assert task.question and task.answer and task.trace
        if kind == "json" and task.question.startswith("Write"):
            assert json.loads(task.answer)
