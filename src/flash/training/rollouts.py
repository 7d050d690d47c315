"""Episodes: sampled from the policy, played against the environment, scored in groups.

Owns the token record of an episode (which tokens were sampled, which the environment wrote), its budgets, the turns,
and the rule for user code that fails: once more, then the whole group is dropped, never a made-up reward.
Token in, token out: what was sampled is never decoded and encoded again. Knows no gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from flash.environments.protocol import (
    EnvironmentClient,
    EpisodeStart,
    FinishedEpisode,
    Message,
    Score,
    StepResult,
)
from flash.errors import FlashError, InvalidInput, UserCodeError
from flash.inference.chat import ChatRenderer
from flash.inference.engine import Completion, Engine, Request, Sampling, Watch
from flash.inference.sampling import stream_key
from flash.training.advantages import less_thinking

_SCORING_THREADS = 8
_THINK_CLOSE = "</think>"
# Stands for an action when a template renders what comes after it. No template strips or splits it.
_SENTINEL = "flashactionsentinel"


class Stopped(Exception):
    """The run was asked to stop while episodes were under way; nothing of them counts."""


@dataclass(frozen=True)
class Limits:
    """How episodes are sampled and how far they may go, in tokens."""

    group_size: int
    max_tokens: int  # one action
    max_length: int  # the whole transcript, prompt included
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    thinking_penalty: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """One row of a step, opened and rendered. `seed` decides all randomness of its group."""

    row: int
    seed: int
    start: EpisodeStart
    tokens: tuple[int, ...]


@dataclass
class Episode:
    """One transcript as tokens. `sampled[i]` tells whether token i was drawn from the policy, at
    log-probability `logprobs[i]` (0 elsewhere)."""

    prompt_length: int
    messages: list[Message]
    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]
    turns: int = 0
    thinking_tokens: int = 0
    truncated: bool = False  # an action was cut off by max_tokens or by the transcript's budget
    finished: bool = False
    response_text: str = ""
    thinking: str = ""
    raw: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def opened(cls, prompt: Prompt) -> Episode:
        size = len(prompt.tokens)
        return cls(size, list(prompt.start.messages), list(prompt.tokens), [False] * size, [0.0] * size)

    @property
    def sampled_tokens(self) -> int:
        return sum(self.sampled)

    def act(self, completion: Completion) -> None:
        self.tokens.extend(completion.tokens)
        self.sampled.extend([True] * len(completion.tokens))
        self.logprobs.extend(completion.logprobs)
        self.turns += 1
        self.truncated = self.truncated or completion.finish_reason == "length"

    def observe(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self.sampled.extend([False] * len(tokens))
        self.logprobs.extend([0.0] * len(tokens))

    def to_score(self) -> FinishedEpisode:
        return FinishedEpisode(
            messages=self.messages,
            response_text=self.response_text,
            raw=self.raw,
            thinking=self.thinking,
            metadata={"steps": self.steps} if self.steps else {},
            total_tokens=len(self.tokens),
        )


@dataclass
class Group:
    """All episodes of one prompt. Either every one has a reward, or `error` says why the group is dropped."""

    prompt: Prompt
    episodes: list[Episode]
    scores: list[Score] = field(default_factory=list)
    error: FlashError | None = None

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.scores if score.reward is not None]


@dataclass(frozen=True)
class Collected:
    groups: list[Group]
    sampling_seconds: float
    scoring_seconds: float  # what scoring took beyond sampling; the rest went on beside it


class Collector:
    """Plays groups of episodes with one engine against one environment."""

    def __init__(
        self,
        engine: Engine,
        environment: EnvironmentClient,
        renderer: ChatRenderer,
        limits: Limits,
        *,
        split: str,
        stop_ids: Sequence[int],
        adapter: str | None,
        multi_turn: bool,
    ) -> None:
        self._engine = engine
        self._environment = environment
        self._renderer = renderer
        self.limits = limits
        self._split = split
        self._stop_ids = tuple(stop_ids)
        self._adapter = adapter
        self._multi_turn = multi_turn
        closing = renderer.tokenizer(_THINK_CLOSE, add_special_tokens=False)["input_ids"]
        self._close_id = closing[0] if len(closing) == 1 else None
        self._pool = ThreadPoolExecutor(_SCORING_THREADS, thread_name_prefix="environment")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def open(self, rows: Sequence[int], seeds: Sequence[int], *, seed: int) -> list[Prompt | UserCodeError]:
        """Starts and renders an episode of each row; a row whose code fails twice gives its error."""
        starts: list[EpisodeStart | UserCodeError]
        try:
            starts = [*self._environment.start(self._split, rows, seed=seed)]
        except UserCodeError:
            starts = [self._open_alone(row, seed) for row in rows]
        rendered = self._renderer.render_prompts(
            [
                (start.messages, f"row {row} of {self._split}")
                for row, start in zip(rows, starts, strict=True)
                if isinstance(start, EpisodeStart)
            ]
        )
        tokens = iter(rendered)
        return [
            Prompt(row, own_seed, start, tuple(next(tokens))) if isinstance(start, EpisodeStart) else start
            for row, own_seed, start in zip(rows, seeds, starts, strict=True)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, as the policy saw and wrote it: special tokens included."""
        return self._renderer.decode(tokens)

    def _open_alone(self, row: int, seed: int) -> EpisodeStart | UserCodeError:
        try:
            return self._environment.start(self._split, [row], seed=seed)[0]
        except UserCodeError as error:
            return error

    def collect(self, prompts: Sequence[Prompt], watch: Watch) -> Collected:
        """Plays and scores `group_size` episodes of each prompt. Raises Stopped as soon as `watch` says so."""
        began = time.perf_counter()
        groups = [Group(p, [Episode.opened(p) for _ in range(self.limits.group_size)]) for p in prompts]
        scoring: dict[Future[list[Score]], Group] = {}
        live = [(group, sample) for group in groups for sample in range(self.limits.group_size)]
        while live:
            self._play_turn(live, scoring, watch)
            live = [(g, s) for g, s in live if g.error is None and not g.episodes[s].finished]
        sampled = time.perf_counter()
        for future in self._completed(scoring, watch):
            _file_scores(scoring[future], future)
        for group in groups:
            self._take_thinking_penalty(group)
        return Collected(groups, sampled - began, time.perf_counter() - sampled)

    def _play_turn(
        self, live: list[tuple[Group, int]], scoring: dict[Future[list[Score]], Group], watch: Watch
    ) -> None:
        """One action of every live episode. Batches form by index: all of a turn are sampled together."""
        stepping: dict[Future[StepResult], tuple[Group, int]] = {}
        requests, owners = self._requests(live)
        for finished in self._engine.completions(requests, watch=watch):
            if finished.completion.finish_reason == "cancelled":
                raise Stopped
            group, sample = owners[finished.request][finished.sample]
            self._act(group.episodes[sample], finished.completion)
            if self._multi_turn or group.prompt.start.max_turns > 1:
                stepping[self._pool.submit(self._step, group, sample)] = (group, sample)
                for future in [future for future in stepping if future.done()]:
                    self._file_step(stepping.pop(future), future, scoring)
            else:
                group.episodes[sample].finished = True
                self._score_if_finished(group, scoring)
        for step in self._completed(stepping, watch):
            self._file_step(stepping[step], step, scoring)

    def _requests(self, live: list[tuple[Group, int]]) -> tuple[list[Request], list[list[tuple[Group, int]]]]:
        """One request a group for the first action, so that its prompt is prefilled once; then one an episode."""
        requests: list[Request] = []
        owners: list[list[tuple[Group, int]]] = []
        for group, sample in live:
            episode, prompt = group.episodes[sample], group.prompt
            if episode.turns == 0 and sample > 0:
                owners[-1].append((group, sample))
                continue
            seed = prompt.seed if episode.turns == 0 else stream_key(prompt.seed, sample, episode.turns)
            sampling = Sampling(
                max_tokens=min(self.limits.max_tokens, self.limits.max_length - len(episode.tokens)),
                temperature=self.limits.temperature,
                top_p=self.limits.top_p,
                stop=self.limits.stop,
                seed=seed,
                tempered_logprobs=True,
            )
            n = len(group.episodes) if episode.turns == 0 else 1
            requests.append(Request(tuple(episode.tokens), sampling, n=n, adapter=self._adapter))
            owners.append([(group, sample)])
        return requests, owners

    def _act(self, episode: Episode, completion: Completion) -> None:
        """Files an action: its tokens as they are, and its text for the environment."""
        episode.act(completion)
        episode.raw = self._renderer.answer_text(completion.tokens, self._stop_ids)
        if self._renderer.thinking or _THINK_CLOSE in episode.raw:
            episode.thinking, episode.response_text = self._renderer.split_thinking(episode.raw)
        else:
            episode.thinking, episode.response_text = "", episode.raw
        episode.thinking_tokens += self._thinking_tokens(completion.tokens, episode)
        episode.messages.append({"role": "assistant", "content": episode.response_text})

    def _thinking_tokens(self, tokens: Sequence[int], episode: Episode) -> int:
        """How many of an action's tokens belong to its trace, the closing tag included."""
        closings = episode.raw.count(_THINK_CLOSE)
        if not closings:
            return len(tokens) if episode.thinking and not episode.response_text else 0
        by_token = [place for place, token in enumerate(tokens) if token == self._close_id]
        if len(by_token) == closings:
            return by_token[-1] + 1
        low, high = 0, len(tokens)  # the shortest prefix whose text has all the closing tags
        while low < high:
            middle = (low + high) // 2
            if self._renderer.decode(tokens[:middle]).count(_THINK_CLOSE) >= closings:
                high = middle
            else:
                low = middle + 1
        return low

    def _step(self, group: Group, sample: int) -> StepResult:
        """The environment's answer to the newest action; user code that fails is asked once more."""
        episode = group.episodes[sample]
        seed = _small(stream_key(group.prompt.seed, sample, episode.turns, 1))
        for attempt in (1, 2):
            try:
                return self._environment.step(
                    self._split, group.prompt.row, list(episode.messages), episode.response_text, seed=seed
                )
            except UserCodeError:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _file_step(
        self, owner: tuple[Group, int], future: Future[StepResult], scoring: dict[Future[list[Score]], Group]
    ) -> None:
        group, sample = owner
        episode = group.episodes[sample]
        try:
            result = future.result()
        except UserCodeError as error:
            group.error = group.error or error
            return
        if result.metadata:
            episode.steps.append(result.metadata)
        if result.final_response_text is not None:
            episode.response_text = result.final_response_text
        added = self._added_tokens(episode, result.messages) if result.messages else []
        episode.messages.extend(result.messages)
        room = self.limits.max_length - len(episode.tokens) - len(added)
        if result.done or episode.turns >= group.prompt.start.max_turns or not result.messages:
            episode.finished = True
        elif room < 1:  # what the environment wrote stays out of the tokens: no action follows it
            episode.finished = episode.truncated = True
        else:
            episode.observe(added)
        self._score_if_finished(group, scoring)

    def _added_tokens(self, episode: Episode, new: Sequence[Message]) -> list[int]:
        """What the template writes between the newest action and the next one.

        Rendered after a stand-in for the action, since a template may change how it shows the action itself. The token
        that ends a turn belongs to the action if the policy drew it, else to the environment.
        """
        stand_in = {"role": "assistant", "content": _SENTINEL}
        text = self._renderer.prompt_text([*episode.messages[:-1], stand_in, *new], where="an environment's turn")
        _, found, after = text.rpartition(_SENTINEL)
        if not found:
            raise InvalidInput(
                "the model's chat template leaves earlier assistant turns out, so it can't carry several turns"
            )
        tokens = list(self._renderer.tokenizer(after, add_special_tokens=False)["input_ids"])
        if tokens and episode.tokens[-1] in self._stop_ids and episode.tokens[-1] == tokens[0]:
            tokens = tokens[1:]
        return tokens

    def _score_if_finished(self, group: Group, scoring: dict[Future[list[Score]], Group]) -> None:
        if group.error is None and all(episode.finished for episode in group.episodes):
            scoring[self._pool.submit(self._score, group)] = group

    def _score(self, group: Group) -> list[Score]:
        """A reward for every episode of the group; user code that fails is asked once more."""
        seed = _small(stream_key(group.prompt.seed, 2))
        episodes = [episode.to_score() for episode in group.episodes]
        for attempt in (1, 2):
            try:
                return checked(
                    self._environment.score(self._split, group.prompt.row, episodes, seed=seed), len(episodes)
                )
            except UserCodeError:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _completed(self, futures: dict[Future[Any], Any], watch: Watch) -> Iterator[Future[Any]]:
        """The futures as they complete, asking `watch` meanwhile."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            if watch():
                raise Stopped
            yield from (future for future in futures if future in done)

    def _take_thinking_penalty(self, group: Group) -> None:
        coefficient = self.limits.thinking_penalty
        if not coefficient or group.error is not None:
            return
        for index, (episode, score) in enumerate(zip(group.episodes, group.scores, strict=True)):
            reward = less_thinking(
                score.reward or 0.0,
                coefficient=coefficient,
                thinking_tokens=episode.thinking_tokens,
                max_tokens=self.limits.max_tokens * episode.turns,
            )
            group.scores[index] = replace(score, reward=reward)


def checked(scores: Sequence[Score], expected: int) -> list[Score]:
    """The scores, if every episode has a finite one. Raises UserCodeError otherwise: no reward is ever made up."""
    if len(scores) != expected:
        raise UserCodeError(f"scoring returned {len(scores)} rewards for {expected} episodes: it must return one each")
    for score in scores:
        if score.error is not None:
            raise UserCodeError(score.error)
        if score.reward is None or not math.isfinite(score.reward):
            raise UserCodeError(f"reward = {score.reward}: must be a finite number")
    return list(scores)


def _file_scores(group: Group, future: Future[list[Score]]) -> None:
    try:
        group.scores = future.result()
    except UserCodeError as error:
        group.error = error


def _small(key: int) -> int:
    """A key that fits a float's integers, as JSON carries it."""
    return key >> 11
