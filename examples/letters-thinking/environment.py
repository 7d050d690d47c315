"""Reverse five letters, thinking first: only what follows `</think>` is the answer. See README.md."""

from __future__ import annotations

from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult


def parse_letters(text: str) -> list[str] | None:
    """The single letters that `text` consists of, or None if it is anything but letters with spaces between."""
    letters = text.strip(" \t\r\n").split(" ")
    return letters if all(len(letter) == 1 and "a" <= letter <= "z" for letter in letters) else None


class Letters(EnvironmentSingleTurn):
    """One question, one answer, scored 1 for an exact match and 0 otherwise."""

    def build_prompt_messages(self, example: TaskExample, prompt_text: str) -> list[dict[str, str]]:
        """The question as it stands in the row. `prompt_text` is added by the SDK as a system message."""
        return [{"role": "user", "content": example.input}]

    def score_response(self, example: TaskExample, response_text: str) -> RewardResult:
        """`response_text` is the answer alone; its attribute `thinking` holds what came before it."""
        gold = parse_letters(str(example.output))
        if gold is None:
            raise ValueError(f"gold answer {example.output!r} is not letters with spaces; fix the row's output")
        given = parse_letters(response_text)
        right = given == gold
        thinking = getattr(response_text, "thinking", "")
        return RewardResult(
            score=float(right),
            success=right,
            name="exact_match",
            return_type="binary",
            metrics=(
                RewardMetric(name="well_formed", score=float(given is not None)),
                RewardMetric(name="thinking_characters", score=float(len(thinking))),
            ),
        )


def load_environment() -> Letters:
    """Called by Flash, once, before it reads `dataset/`."""
    return Letters()
