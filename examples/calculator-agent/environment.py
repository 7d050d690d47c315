"""An agent with one tool: a calculator, called by text. It calls, reads the result, and answers.

    user       Use the calculator. 513 - 178?
    assistant  <call>513 - 178</call>
    user       <result>335</result>
    assistant  335

Whatever is no well-formed call is the agent's answer. See README.md for the reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from freesolo.contracts.types import ChatMessage
from freesolo.datasets import TaskExample
from freesolo.environments import (
    EnvironmentEpisode,
    EnvironmentMultiTurn,
    EnvironmentStepResult,
    RewardMetric,
    RewardResult,
)

MAX_TURNS = 3  # one call more than is needed, so that a wrong one can be mended
CALLED = 0.1  # what a wrong answer is worth after any call ...
CALLED_RIGHT = 0.3  # ... and after one that gave the right result

_CALL = re.compile(r"<call>(-?[0-9]{1,9}) ([+-]) (-?[0-9]{1,9})</call>")
# One number, plain ASCII digits, no leading zeros, no sign on zero, at most nine digits.
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,8}")


def parse_answer(text: str) -> int | None:
    """The number that `text` consists of, or None if it is anything but one plain whole number."""
    match = _WHOLE_NUMBER.fullmatch(text.strip(" \t\r\n"))
    return int(match.group()) if match else None


def calculate(text: str) -> int | None:
    """The tool: the result of the one call that `text` consists of, or None if it is no call."""
    match = _CALL.fullmatch(text.strip(" \t\r\n"))
    if match is None:
        return None
    first, second = int(match[1]), int(match[3])
    return first + second if match[2] == "+" else first - second


def said(messages: Sequence[ChatMessage]) -> list[str]:
    """What the agent has said, in order."""
    return [str(message["content"] or "") for message in messages if message["role"] == "assistant"]


def gold_of(example: TaskExample) -> int:
    """The row's answer. A row without a usable one is an error, never a wrong answer."""
    gold = parse_answer(str(example.output))
    if gold is None:
        raise ValueError(f"gold answer {example.output!r} is not a whole number; fix the row's output")
    return gold


class CalculatorAgent(EnvironmentMultiTurn):
    """One question an episode, which ends with the first turn that is no call."""

    def start_episode(self, example: TaskExample, prompt_text: str) -> list[ChatMessage]:
        return [{"role": "user", "content": str(example.input)}]

    def max_episode_turns(self, example: TaskExample) -> int:
        return MAX_TURNS

    def step_episode(
        self, example: TaskExample, messages: list[ChatMessage], assistant_response: str
    ) -> EnvironmentStepResult:
        """Runs the tool if it was called; everything else is the answer."""
        result = calculate(assistant_response)
        if result is None:
            return EnvironmentStepResult(done=True, final_response_text=assistant_response)
        return EnvironmentStepResult(
            done=False,
            messages=({"role": "user", "content": f"<result>{result}</result>"},),
            metadata={"result": result},
        )

    def score_episode(self, example: TaskExample, episode: EnvironmentEpisode) -> RewardResult:
        """1 for the right answer; a little for calling the tool, so that there is a way towards it."""
        gold = gold_of(example)
        texts = said(episode.messages) or [episode.response_text]
        results = [result for result in map(calculate, texts) if result is not None]
        right = parse_answer(texts[-1]) == gold
        consolation = CALLED_RIGHT if gold in results else CALLED if results else 0.0
        return RewardResult(
            score=1.0 if right else consolation,
            success=right,
            name="answer",
            metrics=(
                RewardMetric(name="calls", score=float(len(results))),
                RewardMetric(name="right_call", score=float(gold in results)),
            ),
        )

    def sft_completion(self, example: TaskExample) -> list[ChatMessage]:
        """The call, its result, and the answer."""
        gold = gold_of(example)
        call = f"<call>{example.metadata['call']}</call>"
        return [
            {"role": "assistant", "content": call},
            {"role": "user", "content": f"<result>{calculate(call)}</result>"},
            {"role": "assistant", "content": str(gold)},
        ]


def load_environment() -> CalculatorAgent:
    """Called by Flash, once, before it reads `dataset/`."""
    return CalculatorAgent()
