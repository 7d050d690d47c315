"""Two-digit arithmetic: sums, differences and one-sentence stories about both.

The answer counts only if it is the right whole number and nothing else. See README.md for the rows.
"""

from __future__ import annotations

import re

from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentSingleTurn, RewardMetric, RewardResult

# One number, plain ASCII digits, no leading zeros, no sign on zero, at most nine digits.
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,8}")


def parse_answer(text: str) -> int | None:
    """The number that `text` consists of, or None if it is anything but one plain whole number.

    Spaces and line breaks around the number are forgiven, nothing else is: "85." and "It is 85" are
    not answers here, because a reward that searches for a number also pays for "84 or 85".
    """
    match = _WHOLE_NUMBER.fullmatch(text.strip(" \t\r\n"))
    return int(match.group()) if match else None


class Arithmetic(EnvironmentSingleTurn):
    """One question, one answer, scored 1 for an exact match and 0 otherwise."""

    def build_prompt_messages(self, example: TaskExample, prompt_text: str) -> list[dict[str, str]]:
        """The question as it stands in the row. `prompt_text` is added by the SDK as a system message."""
        return [{"role": "user", "content": example.input}]

    def score_response(self, example: TaskExample, response_text: str) -> RewardResult:
        """Compare numbers, not text. A row without a usable gold answer is an error, never a zero."""
        gold = parse_answer(str(example.output))
        if gold is None:
            raise ValueError(f"gold answer {example.output!r} is not a whole number; fix the row's output")
        given = parse_answer(response_text)
        right = given == gold
        return RewardResult(
            score=float(right),
            success=right,
            name="exact_match",
            return_type="binary",
            reason=None if right else ("not one whole number" if given is None else "another number"),
            metrics=(RewardMetric(name="well_formed", score=float(given is not None)),),
        )


def load_environment() -> Arithmetic:
    """Called by Flash, once, before it reads `dataset/`."""
    return Arithmetic()
