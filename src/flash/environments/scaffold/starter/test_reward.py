"""The reward decides what a model learns: try it on good, bad and odd answers. Run with `pytest`."""

import pytest
from environment import load_environment
from freesolo.datasets import TaskExample

EXAMPLE = TaskExample(record={"input": "I was charged twice", "output": "billing"}, input="…", output="billing")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("billing", 1.0),
        (" Billing.\n", 1.0),
        ("This is for billing", 0.2),
        ("billing or bug", 0.0),
        ("bug", 0.0),
        ("", 0.0),
        ("billing" * 1000 + "account", 0.0),
    ],
)
def test_reward(answer: str, score: float) -> None:
    assert load_environment().score_response(EXAMPLE, answer).score == score
