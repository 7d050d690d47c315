"""The game and the agent: what ends an episode, what it is worth, and that malformed actions win nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from freesolo.datasets import TaskExample
from freesolo.environments import EnvironmentEpisode
from hypothesis import given
from hypothesis import strategies as st

from flash.environments.loading import LocalEnvironment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GUESS = LocalEnvironment(EXAMPLES / "guess")


def play(environment: Any, example: TaskExample, actions: list[str]) -> tuple[list[dict[str, str]], bool]:
    """The transcript of these actions, as far as the episode lets them, and whether it ended by itself."""
    messages = environment.start_episode(example, "")
    for action in actions[: environment.max_episode_turns(example)]:
        messages = [*messages, {"role": "assistant", "content": action}]
        result = environment.step_episode(example, messages, action)
        messages = [*messages, *result.messages]
        if result.done:
            return messages, True
    return messages, False


def score(environment: Any, example: TaskExample, actions: list[str]) -> float:
    messages, _ = play(environment, example, actions)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    [result] = environment.score_episodes(
        example, [EnvironmentEpisode(messages=tuple(messages), response_text=said[-1])]
    )
    assert result.error is None
    return float(result.score)


@pytest.fixture
def guess() -> Any:
    return GUESS.environment


@pytest.fixture
def agent(tmp_path: Path) -> Any:
    return LocalEnvironment(EXAMPLES / "calculator-agent", None, tmp_path).environment


# --- guess ---------------------------------------------------------------------------------------------


def secret(number: object) -> TaskExample:
    return TaskExample(record={}, input="Guess my number from 1 to 20.", output=number)


def test_hints_lead_to_the_number(guess: Any) -> None:
    messages, done = play(guess, secret("13"), ["10", "15", "13"])
    assert [message["content"] for message in messages[2::2]] == ["higher", "lower"]
    assert done
    assert score(guess, secret("13"), ["10", "15", "13"]) == 1.0


@pytest.mark.parametrize("number", range(1, 21))
def test_the_gold_game_is_played_by_the_rules_and_wins(guess: Any, number: int) -> None:
    completion = guess.sft_completion(secret(str(number)))
    actions = [message["content"] for message in completion if message["role"] == "assistant"]
    messages, done = play(guess, secret(str(number)), actions)
    assert messages[1:] == completion
    assert done
    assert score(guess, secret(str(number)), actions) == 1.0


def test_the_sixth_guess_comes_too_late(guess: Any) -> None:
    actions = ["20", "19", "18", "17", "16", "13"]
    messages, done = play(guess, secret("13"), actions)
    assert done
    assert messages[-1] == {"role": "assistant", "content": "16"}
    assert score(guess, secret("13"), actions) < 0.5


def test_a_lost_game_is_worth_what_it_ruled_out(guess: Any) -> None:
    one, two = score(guess, secret("13"), ["10", "x"]), score(guess, secret("13"), ["10", "15", "x"])
    assert 0 < one < two < 0.5
    assert score(guess, secret("13"), ["10", "5", "9", "3", "x"]) == one  # told nothing new
    assert score(guess, secret("13"), ["1", "x"]) < one


@pytest.mark.parametrize(
    "text", ["", " ", "0", "21", "013", "-13", "13.", "13 14", "12 or 13", "thirteen", "１３", "1" * 5000, "<think>13"]
)
def test_what_is_no_guess_ends_the_game_with_nothing(guess: Any, text: str) -> None:
    assert play(guess, secret("13"), [text, "13"])[1]
    assert score(guess, secret("13"), [text, "13"]) == 0.0


@given(number=st.integers(1, 20), actions=st.lists(st.integers(0, 22).map(str), min_size=1, max_size=7))
def test_only_the_number_within_five_guesses_is_worth_one(number: int, actions: list[str]) -> None:
    environment = GUESS.environment
    messages, _ = play(environment, secret(str(number)), actions)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    worth = score(environment, secret(str(number)), actions)
    assert (worth == 1.0) == (str(number) in said)
    assert worth == 1.0 or 0.0 <= worth <= 0.5


@pytest.mark.parametrize("number", [None, "", "21", "many"])
def test_a_game_without_a_secret_is_an_error(guess: Any, number: object) -> None:
    with pytest.raises(ValueError, match="fix the row's output"):
        guess.score_response(secret(number), "13")


# --- calculator-agent ------------------------------------------------------------------------------------


def question(gold: object = "335") -> TaskExample:
    return TaskExample(
        record={}, input="Use the calculator. 513 - 178?", output=gold, metadata={"call": "513 - 178"}
    )


def test_a_call_is_answered_with_its_result(agent: Any) -> None:
    messages, done = play(agent, question(), ["<call>513 - 178</call>", "335"])
    assert [message["content"] for message in messages[1:]] == [
        "<call>513 - 178</call>",
        "<result>335</result>",
        "335",
    ]
    assert done
    assert score(agent, question(), ["<call>513 - 178</call>", "335"]) == 1.0


def test_the_gold_episode_is_what_the_tool_would_say(agent: Any) -> None:
    assert agent.sft_completion(question()) == play(agent, question(), ["<call>513 - 178</call>", "335"])[0][1:]


def test_a_wrong_call_can_be_mended_once(agent: Any) -> None:
    assert score(agent, question(), ["<call>513 - 17</call>", "<call>513 - 178</call>", "335"]) == 1.0
    calls = ["<call>513 - 17</call>", "<call>1 + 1</call>", "<call>513 - 178</call>", "335"]
    assert score(agent, question(), calls) == 0.3  # three turns are all there are


def test_calling_is_worth_something_and_the_answer_most(agent: Any) -> None:
    assert score(agent, question(), ["335"]) == 1.0  # who needs no tool needs no tool
    assert score(agent, question(), ["334"]) == 0.0
    assert score(agent, question(), ["<call>1 + 1</call>", "2"]) == 0.1
    assert score(agent, question(), ["<call>513 - 178</call>", "334"]) == 0.3
    assert score(agent, question(), ["<call>513 - 178</call>", "It is 335"]) == 0.3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<call>",
        "<call></call>",
        "<call>513-178</call>",
        "<call>513 - 178",
        "<call>513 * 178</call>",
        "<call>513 - 178</call> 335",
        "<call>513 - 178</call><call>513 - 178</call>",
        "<call>__import__('os')</call>",
        "<call>" + "9" * 5000 + " + 1</call>",
        "<call>５１３ - １７８</call>",
        "<result>335</result>",
        "<think>335",
        "335.",
        "0335",
        "335 336",
        "３３５",
    ],
)
def test_what_is_neither_call_nor_number_ends_the_episode_with_nothing(agent: Any, text: str) -> None:
    assert play(agent, question(), [text, "335"])[1]
    assert score(agent, question(), [text, "335"]) == 0.0


@pytest.mark.parametrize("gold", [None, "", "335.0", "about 335"])
def test_a_question_without_a_gold_answer_is_an_error(agent: Any, gold: object) -> None:
    with pytest.raises(ValueError, match="fix the row's output"):
        agent.score_response(question(gold), "335")
