"""`flash env check` names what a run would have met."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flash.environments.checking import check, spread
from flash.errors import InvalidInput

Write = Callable[..., Path]

TRAIN = '{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n'
CODE = """
    from freesolo.environments import EnvironmentSingleTurn, RewardResult

    class Env(EnvironmentSingleTurn):
        def build_prompt_messages(self, example, prompt_text):
            return [{"role": "user", "content": example.input}]

        def score_response(self, example, text):
            return RewardResult(score=SCORE)

    def load_environment(**params):
        return Env()
"""


def test_a_sound_environment_has_no_problem(write: Write) -> None:
    report = check(write({"dataset/train.jsonl": TRAIN, "dataset/eval.jsonl": TRAIN}))
    assert report.ok
    assert report.warnings == []
    assert report.splits == {"train": 2, "eval": 2}
    assert (report.prompt[0]["content"], report.completion[0]["content"]) == ("a", "b")
    assert report.gold is not None
    assert (report.gold.scored, report.gold.mean, report.gold.empty_answer) == (2, 1.0, 0.0)


@pytest.mark.parametrize(
    ("score", "problem"),
    [
        ("0.0", "all 2 gold answers looked at score 0"),
        ("float('nan')", "the gold answer has no score: score = nan"),
        ("1 / 0", "environment.py line 9 in scoring: ZeroDivisionError"),
        ("1 / len(text)", "an empty answer has no score: .*ZeroDivisionError"),
        ("__import__('sys').exit(1)", "called sys.exit"),
    ],
)
def test_a_broken_reward_is_a_problem(write: Write, score: str, problem: str) -> None:
    report = check(write({"dataset/train.jsonl": TRAIN}, code=CODE.replace("SCORE", score)))
    assert not report.ok
    assert re.search(problem, report.problems[0])


@pytest.mark.parametrize(
    ("score", "warning"),
    [
        ("1.0", "an empty answer scores 1"),
        ("float(example.output == text == 'b')", "1 of 2 gold answers looked at score 0"),
    ],
)
def test_a_doubtful_reward_is_a_warning(write: Write, score: str, warning: str) -> None:
    report = check(write({"dataset/train.jsonl": TRAIN}, code=CODE.replace("SCORE", score)))
    assert report.ok
    assert any(warning in text for text in report.warnings)


@pytest.mark.parametrize(
    ("files", "params", "problem"),
    [
        ({}, {}, "no rows"),
        ({"dataset/train.jsonl": '{"output": "b"}'}, {}, "dataset/train.jsonl line 1: no `input`"),
        ({"dataset/train.jsonl": TRAIN, "dataset/eval.jsonl": "{}"}, {}, "dataset/eval.jsonl line 1: no `input`"),
        ({"dataset/train.jsonl": TRAIN}, {"split": "test"}, "split 'test' is missing"),
        ({"dataset/train.jsonl": TRAIN}, {"dataset_path": "x.jsonl"}, "no such file"),
    ],
)
def test_rows_that_a_run_would_stop_at(
    write: Write, files: dict[str, str | bytes], params: dict[str, Any], problem: str
) -> None:
    report = check(write(files), params)
    assert any(problem in text for text in report.problems)


def test_a_package_that_can_not_be_imported_or_packed(write: Write, tmp_path: Path) -> None:
    assert "ValueError: no" in check(write(code="def load_environment(): ...\nraise ValueError('no')")).problems[0]
    assert "environment.py line 1" in check(write(code="def (")).problems[0]
    assert "must be a folder with environment.py" in check(tmp_path / "nothing").problems[0]


def test_what_does_not_ship_is_missing_in_the_check_as_in_a_run(write: Write) -> None:
    code = "open(__file__.replace('environment.py', 'prompts/a.txt'))\ndef load_environment(): ...\n"
    report = check(write({"prompts/a.txt": ""}, code=code))
    assert "FileNotFoundError" in report.problems[0]
    prompts = 'P = "prompts/a.txt"\n' + "def load_environment(): ...\n"
    assert "prompts/a.txt, which does not ship" in check(write({"prompts/a.txt": ""}, code=prompts)).warnings[0]


def test_rows_without_gold_answers_are_pointed_out(write: Write) -> None:
    report = check(write({"dataset/train.jsonl": '{"input": "a"}\n{"input": "b", "output": "c"}\n'}))
    assert any("1 of 2 rows looked at have no gold answer" in text for text in report.warnings)


def test_prints_go_to_stderr(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    check(write({"dataset/train.jsonl": TRAIN}, code="print('noise')\n" + "def load_environment(): ...\n"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "noise" in captured.err


def test_rendering_is_asked_of_the_caller(write: Write) -> None:
    folder = write({"dataset/train.jsonl": TRAIN})
    report = check(folder, render=lambda prompt, completion: f"{prompt[0]['content']}[{completion[0]['content']}]")
    assert report.rendered == "a[b]"

    def refuse(prompt: object, completion: object) -> str:
        raise InvalidInput("the template has no place for tools")

    assert check(folder, render=refuse).problems == ["the template has no place for tools"]


def test_a_gold_trajectory_is_played_through_the_environment(write: Write) -> None:
    code = """
        from freesolo.environments import EnvironmentMultiTurn, EnvironmentStepResult, RewardResult

        class Env(EnvironmentMultiTurn):
            def start_episode(self, example, prompt_text):
                return [{"role": "user", "content": example.input}]

            def max_episode_turns(self, example):
                return 2

            def step_episode(self, example, messages, action):
                return EnvironmentStepResult(done=action == "stop", messages=({"role": "user", "content": "on"},),
                                             metadata={"action": action})

            def score_episode(self, example, episode):
                steps = [step["action"] for step in episode.metadata.get("steps", [])]
                return RewardResult(score=float(steps == ["go", "stop"]))

        def load_environment():
            return Env()
    """
    output = '[{"role": "assistant", "content": "go"}, {"role": "assistant", "content": "stop"}]'
    report = check(write({"dataset/train.jsonl": f'{{"input": "a", "output": {output}}}'}, code=code))
    assert report.ok
    assert report.multi_turn
    assert report.gold is not None
    assert report.gold.mean == 1.0


def test_thinking_is_taken_off_a_gold_answer_before_it_is_scored(write: Write) -> None:
    report = check(
        write(
            {"dataset/train.jsonl": '{"input": "a", "output": "<think>hm</think>\\n\\nb", "metadata": {"gold": "b"}}'},
            code=CODE.replace("SCORE", "float(text == example.metadata['gold'] and text.thinking == 'hm')"),
        )
    )
    assert report.gold is not None
    assert report.gold.mean == 1.0


def test_rows_looked_at_are_spread_over_the_split() -> None:
    assert spread(3, 10) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]
