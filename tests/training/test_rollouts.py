"""Episodes against environments of every kind: whose token is whose, budgets, and user code that fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flash.environments.protocol import (
    EnvironmentInfo,
    EpisodeStart,
    FinishedEpisode,
    Message,
    Rows,
    Score,
    SFTTarget,
    StepResult,
)
from flash.errors import UserCodeError
from flash.inference.chat import ChatRenderer
from flash.inference.engine import Finished, Request
from flash.inference.scripted_engine import ScriptedEngine
from flash.training.rollouts import Collector, Episode, Limits, Prompt, Stopped

Score_ = Callable[[int, Sequence[FinishedEpisode]], list[Score]]


def by_length(row: int, episodes: Sequence[FinishedEpisode]) -> list[Score]:
    return [Score(float(len(episode.response_text))) for episode in episodes]


@dataclass
class Game:
    """An environment in this process: `replies` says what it answers to each action (None: done)."""

    replies: Callable[[int, list[Message]], list[Message] | None] = lambda row, messages: None
    scores: Score_ = by_length
    max_turns: int = 1
    scored: list[tuple[int, list[FinishedEpisode]]] = field(default_factory=list)
    steps: list[list[Message]] = field(default_factory=list)

    def info(self) -> EnvironmentInfo:
        return EnvironmentInfo(multi_turn=self.max_turns > 1, splits=("train",))

    def rows(self, split: str | None = None, *, limit: int = 0) -> Rows:
        return Rows("train", "", 100)

    def targets(self, split: str, indices: Sequence[int]) -> list[SFTTarget]:
        return []

    def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
        return [EpisodeStart([{"role": "user", "content": f"row {i}"}], self.max_turns) for i in indices]

    def step(self, split: str, index: int, messages: list[Message], response: str, *, seed: int) -> StepResult:
        assert messages[-1] == {"role": "assistant", "content": response}
        self.steps.append(messages)
        reply = self.replies(index, messages)
        return StepResult(done=reply is None, messages=reply or [], metadata={"turn": len(messages)})

    def score(self, split: str, index: int, episodes: Sequence[FinishedEpisode], *, seed: int) -> list[Score]:
        self.scored.append((index, list(episodes)))
        return self.scores(index, episodes)

    def close(self) -> None:
        pass


class Recorder(ScriptedEngine):
    """A scripted engine that remembers which completion it gave to which prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[tuple[Request, Finished]] = []

    def completions(self, requests: Sequence[Request], *, watch: Any = None) -> Iterator[Finished]:
        for finished in super().completions(requests, watch=watch):
            self.given.append((requests[finished.request], finished))
            yield finished


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


def collector(engine: ScriptedEngine, game: Game, tokenizer: Any, limits: Limits, **options: Any) -> Collector:
    renderer = ChatRenderer(tokenizer, thinking=options.get("thinking", False))
    return Collector(
        engine, game, renderer, limits, split="train", stop_ids=(tokenizer.eos_token_id,), adapter="policy",
        multi_turn=game.max_turns > 1,
    )  # fmt: skip


def play(made: Collector, rows: Sequence[int], watch: Callable[[], bool] = lambda: False) -> Any:
    prompts = made.open(rows, [1000 + row for row in rows], seed=0)
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    try:
        return made.collect(prompts, watch)  # type: ignore[arg-type]
    finally:
        made.close()


def says(tokenizer: Any, text: str, *, end: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end


# --- the property ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    group_size=st.integers(1, 4),
    max_tokens=st.integers(1, 12),
    slack=st.integers(0, 200),
    max_turns=st.integers(1, 5),
)
def test_tokens_masks_and_budgets_hold_for_any_environment(
    tokenizer: Any, seed: int, group_size: int, max_tokens: int, slack: int, max_turns: int
) -> None:
    """What is trained is what was sampled, in order; the rest is the template's and the environment's."""
    end = tokenizer.eos_token_id

    def script(request: Request, sample: int) -> list[int]:
        dice = random.Random(f"{seed}/{request.prompt}/{request.sampling.seed}/{sample}")
        return [dice.choice([*range(33, 60), 200, end]) for _ in range(dice.randint(1, 15))]

    def replies(row: int, messages: list[Message]) -> list[Message] | None:
        dice = random.Random(f"{seed}/{row}/{len(messages)}")
        roles = dice.choices(["user", "tool"], k=dice.choice([0, 1, 1, 1, 2]))
        if dice.random() < 0.2:
            return None
        return [{"role": role, "content": "hé!" * dice.randint(1, 9)} for role in roles]

    engine = Recorder(script, stop_ids=[end])
    game = Game(replies, max_turns=max_turns)
    prompt_length = len(ChatRenderer(tokenizer).render_prompt([{"role": "user", "content": "row 0"}]))
    limits = Limits(group_size, max_tokens, max_length=prompt_length + max_tokens + slack)
    collected = play(collector(engine, game, tokenizer, limits), [0, 1, 2])

    given: dict[tuple[int, ...], list[Any]] = {}
    for request, finished in engine.given:
        given.setdefault(request.prompt, []).append(finished.completion)
    for group in collected.groups:
        assert len(group.episodes) == group_size and len(group.rewards) == group_size
        for episode in group.episodes:
            check_episode(episode, group.prompt, given, limits, max_turns, end)
    assert {row for row, _ in game.scored} == {0, 1, 2}


def check_episode(episode: Episode, prompt: Prompt, given: dict, limits: Limits, max_turns: int, end: int) -> None:
    assert len(episode.tokens) == len(episode.sampled) == len(episode.logprobs) <= limits.max_length
    assert tuple(episode.tokens[: episode.prompt_length]) == prompt.tokens
    assert not any(episode.sampled[: episode.prompt_length]) and episode.sampled[-1]
    assert 1 <= episode.turns <= max_turns
    assert episode.logprobs == [-1.0 if mask else 0.0 for mask in episode.sampled]
    # walk through the actions: each began where a request ended, and holds one completion of it
    place, actions = episode.prompt_length, 0
    while place < len(episode.tokens):
        assert episode.sampled[place]
        completions = given[tuple(episode.tokens[:place])]
        longest = max(
            (c for c in completions if tuple(episode.tokens[place : place + len(c.tokens)]) == c.tokens),
            key=lambda c: len(c.tokens),
        )
        assert 1 <= len(longest.tokens) <= limits.max_tokens
        assert end not in longest.tokens[:-1]
        assert all(episode.sampled[place : place + len(longest.tokens)])
        place += len(longest.tokens)
        actions += 1
        between = place
        while place < len(episode.tokens) and not episode.sampled[place]:
            place += 1
        if place > between:  # the turn's end was written exactly once, by one of the two
            assert [episode.tokens[between - 1], episode.tokens[between]].count(end) == 1
    assert actions == episode.turns == sum(m["role"] == "assistant" for m in episode.messages)


# --- turns ----------------------------------------------------------------------------------------------


def test_a_transcripts_tokens_read_as_the_template_renders_its_messages(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda r, s: says(tokenizer, f"act {len(r.prompt)}"), stop_ids=[tokenizer.eos_token_id])
    game = Game(lambda row, m: [{"role": "user", "content": f"seen {len(m)}"}], max_turns=3)
    [group] = play(collector(engine, game, tokenizer, Limits(2, 20, 500)), [4]).groups
    for episode in group.episodes:
        shown = tokenizer.decode(episode.tokens)
        assert [m["role"] for m in episode.messages] == ["user", *["assistant", "user"] * 3]
        rendered = tokenizer.apply_chat_template(episode.messages[:-1], tokenize=False)
        assert shown == rendered.removesuffix("\n")
        assert episode.steps == [{"turn": 2}, {"turn": 4}, {"turn": 6}]


def test_an_action_cut_short_is_closed_by_the_environments_tokens(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda r, s: says(tokenizer, "x" * 9, end=False), stop_ids=[tokenizer.eos_token_id])
    game = Game(lambda row, m: [{"role": "user", "content": "go on"}], max_turns=2)
    [group] = play(collector(engine, game, tokenizer, Limits(1, 4, 500)), [0]).groups
    [episode] = group.episodes
    assert episode.truncated and episode.turns == 2
    assert "xxxx<|im_end|>\n<|im_start|>user\ngo on" in tokenizer.decode(episode.tokens)


def test_the_transcripts_budget_ends_an_episode_and_it_is_scored(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda r, s: says(tokenizer, "move"), stop_ids=[tokenizer.eos_token_id])
    game = Game(lambda row, m: [{"role": "user", "content": "z" * 60}], max_turns=50)
    [group] = play(collector(engine, game, tokenizer, Limits(1, 10, 330)), [0]).groups
    [episode] = group.episodes
    assert 1 < episode.turns < 10 and len(episode.tokens) <= 330
    assert episode.truncated and group.rewards == [4.0]
    assert episode.messages[-1]["content"] == "z" * 60  # the reward sees what the environment said last


def test_stop_sequences_stay_in_what_is_scored(tokenizer: Any) -> None:
    engine = ScriptedEngine(
        lambda r, s: says(tokenizer, "<a>7</a> and more"), stop_ids=[tokenizer.eos_token_id], decode=tokenizer.decode
    )
    game = Game()
    [group] = play(collector(engine, game, tokenizer, Limits(1, 40, 200, stop=("</a>",))), [0]).groups
    assert game.scored[0][1][0].response_text == "<a>7</a>"
    assert tokenizer.decode(group.episodes[0].tokens).endswith("<a>7</a>") and group.episodes[0].sampled[-1]
    assert engine.requests[0].sampling.stop == ("</a>",)


def test_a_group_shares_one_request_and_later_turns_draw_from_seeds_of_their_own(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda r, s: says(tokenizer, "same"), stop_ids=[tokenizer.eos_token_id])
    game = Game(lambda row, m: [{"role": "user", "content": "next"}], max_turns=2)
    play(collector(engine, game, tokenizer, Limits(3, 10, 300, temperature=0.5, top_p=0.9)), [1, 2])
    assert [request.n for request in engine.requests] == [3, 3, *[1] * 6]
    assert len({request.sampling.seed for request in engine.requests}) == 8
    assert {(r.sampling.temperature, r.sampling.top_p, r.adapter) for r in engine.requests} == {(0.5, 0.9, "policy")}


# --- thinking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "thinking", "share"),
    [
        ("ab</think>7", "7", "ab", 10 / 40),
        ("<think>ab</think>7", "7", "ab", 17 / 40),
        ("a</think>b</think>7", "7", "a</think>b", 18 / 40),
        ("never closed", "", "never closed", 12 / 40),
    ],
)
def test_the_answer_is_what_follows_the_last_think_tag_and_its_trace_costs(
    text: str, answer: str, thinking: str, share: float, tokenizer: Any
) -> None:
    own = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    own.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% if not", "assistant\n{% if enable_thinking -%}{{ '<think>\n' }}{%- endif -%}{% if not"
    )
    engine = ScriptedEngine(lambda r, s: says(own, text, end=False), stop_ids=[own.eos_token_id])
    game = Game(scores=lambda row, episodes: [Score(1.0) for _ in episodes])
    limits = Limits(1, 40, 300, thinking_penalty=0.5)
    [group] = play(collector(engine, game, own, limits, thinking=True), [0]).groups
    seen = game.scored[0][1][0]
    assert (seen.response_text, seen.thinking, seen.raw) == (answer, thinking, text)
    assert group.rewards == [pytest.approx(1 - 0.5 * share)]
    assert tuple(group.episodes[0].tokens[-len(text) :]) == tuple(says(own, text, end=False))


# --- user code that fails --------------------------------------------------------------------------------


def failing(times: int, result: Callable[[int], list[Score]] | None = None) -> tuple[Score_, list[int]]:
    calls: list[int] = []

    def scores(row: int, episodes: Sequence[FinishedEpisode]) -> list[Score]:
        if row != 1:
            return [Score(1.0)] * len(episodes)
        calls.append(row)
        if len(calls) <= times:
            if result is not None:
                return result(len(episodes))
            raise UserCodeError("environment.py line 3 in scoring: ZeroDivisionError", detail="Traceback …")
        return [Score(1.0)] * len(episodes)

    return scores, calls


@pytest.mark.parametrize(
    "bad",
    [
        None,
        lambda n: [Score(1.0)] * (n - 1),
        lambda n: [Score(1.0)] * (n + 1),
        lambda n: [Score(float("nan")), *[Score(1.0)] * (n - 1)],
        lambda n: [*[Score(1.0)] * (n - 1), Score(float("inf"))],
        lambda n: [Score(None, error="the judge is down")] * n,
        lambda n: [Score(None)] * n,
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_bad_reward_is_asked_for_once_more_and_then_costs_its_group(bad: Any, times: int, tokenizer: Any) -> None:
    scores, calls = failing(times, bad)
    engine = ScriptedEngine(lambda r, s: says(tokenizer, "x"), stop_ids=[tokenizer.eos_token_id])
    groups = play(collector(engine, Game(scores=scores), tokenizer, Limits(3, 5, 200)), [0, 1, 2]).groups
    assert len(calls) == 2
    assert [group.rewards for group in groups] == [[1.0] * 3, [1.0] * 3 if times == 1 else [], [1.0] * 3]
    assert (groups[1].error is None) == (times == 1)
    if bad is None and times == 2:
        assert groups[1].error.detail == "Traceback …"


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_raises_is_asked_once_more_and_then_costs_its_group(times: int, tokenizer: Any) -> None:
    failures = [0]
    lock = threading.Lock()

    def replies(row: int, messages: list[Message]) -> list[Message] | None:
        with lock:
            if row == 1 and failures[0] < times:
                failures[0] += 1
                raise UserCodeError("environment.py line 9 in step_episode: KeyError")
        return None

    engine = ScriptedEngine(lambda r, s: says(tokenizer, "x"), stop_ids=[tokenizer.eos_token_id])
    groups = play(collector(engine, Game(replies, max_turns=2), tokenizer, Limits(1, 5, 200)), [0, 1]).groups
    assert [group.error is None for group in groups] == [True, times == 1]
    assert groups[0].rewards == [1.0]


def test_rows_that_fail_to_open_are_told_from_those_that_do(tokenizer: Any) -> None:
    class Picky(Game):
        def start(self, split: str, indices: Sequence[int], *, seed: int) -> list[EpisodeStart]:
            if 1 in indices:
                raise UserCodeError("environment.py line 2 in start_episode: no row 1")
            return super().start(split, indices, seed=seed)

    engine = ScriptedEngine(lambda r, s: says(tokenizer, "x"))
    made = collector(engine, Picky(), tokenizer, Limits(1, 5, 200))
    opened = made.open([0, 1, 2], [7, 8, 9], seed=0)
    made.close()
    assert [type(each) for each in opened] == [Prompt, UserCodeError, Prompt]


# --- order and stopping ------------------------------------------------------------------------------------


def test_a_group_is_scored_while_others_decode(tokenizer: Any) -> None:
    scored_first = threading.Event()

    def scores(row: int, episodes: Sequence[FinishedEpisode]) -> list[Score]:
        scored_first.set()
        return [Score(0.0)] * len(episodes)

    class Waiting(ScriptedEngine):
        """Gives row 1's completion only once row 0's group is scored."""

        def completions(self, requests: Sequence[Request], *, watch: Any = None) -> Iterator[Finished]:
            for finished in super().completions(requests, watch=watch):
                if finished.request == 1:
                    assert scored_first.wait(5)
                yield finished

    engine = Waiting(lambda r, s: says(tokenizer, "x"), stop_ids=[tokenizer.eos_token_id])
    groups = play(collector(engine, Game(scores=scores), tokenizer, Limits(1, 5, 200)), [0, 1]).groups
    assert [group.rewards for group in groups] == [[0.0], [0.0]]


def test_being_asked_to_stop_ends_sampling_and_scoring(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda r, s: says(tokenizer, "x"), stop_ids=[tokenizer.eos_token_id])
    with pytest.raises(Stopped):
        play(collector(engine, Game(), tokenizer, Limits(2, 5, 200)), [0, 1], watch=lambda: True)

    released = threading.Event()

    def hanging(row: int, episodes: Sequence[FinishedEpisode]) -> list[Score]:
        released.wait(10)
        return [Score(0.0)] * len(episodes)

    sampling = [True]
    engine = ScriptedEngine(lambda r, s: says(tokenizer, "x"), stop_ids=[tokenizer.eos_token_id])
    made = collector(engine, Game(scores=hanging), tokenizer, Limits(1, 5, 200))
    with pytest.raises(Stopped):
        play(made, [0], watch=lambda: not sampling.pop() if sampling else True)
    released.set()
