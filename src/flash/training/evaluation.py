"""Base against adapter: both answer the held-out rows, greedily, and the environment scores them.

Owns that comparison only. It never fails a run: whatever goes wrong is one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash.config.recipes import defaults_for
from flash.config.run import RunSpec
from flash.environments.protocol import EnvironmentClient, FinishedEpisode, Message, Score
from flash.errors import FlashError, InvalidInput
from flash.inference.chat import ChatRenderer
from flash.inference.engine import Engine, Request, Sampling
from flash.inference.loading import BaseModel
from flash.records import EvalReport, Phase
from flash.training.reporter import Reporter

SPLIT, MAX_ROWS = "eval", 200
_ADAPTER = "evaluated"
_SCORERS = 8  # rewards may wait for a network
_SAMPLES = 3  # rows shown side by side in the run's samples


def evaluate(
    spec: RunSpec,
    base: BaseModel,
    engine: Engine,
    environment: EnvironmentClient,
    reporter: Reporter,
    adapter_folder: Path,
    *,
    step: int,
) -> EvalReport | None:
    """Reports and returns the mean rewards; None where there is no eval split or the comparison failed."""
    try:
        if SPLIT not in environment.info().splits:
            return None
        reporter.phase(Phase.EVALUATING)
        return _compare(spec, base, engine, environment, reporter, adapter_folder, step)
    except Exception as error:  # the one boundary: an evaluation must not cost a finished run
        logging.getLogger(__name__).debug("evaluation failed", exc_info=error)
        reason = str(error) if isinstance(error, FlashError) else f"{type(error).__name__}: {error}"
        reporter.warn("evaluation", f"base and adapter could not be compared: {reason}")
        return None


def _compare(
    spec: RunSpec,
    base: BaseModel,
    engine: Engine,
    environment: EnvironmentClient,
    reporter: Reporter,
    adapter_folder: Path,
    step: int,
) -> EvalReport:
    count = environment.rows(SPLIT, limit=MAX_ROWS).count
    engine.load_adapter(_ADAPTER, adapter_folder)
    try:
        episodes = {
            name: _play(spec, base, engine, environment, reporter, count, adapter=name) for name in (None, _ADAPTER)
        }
    finally:
        engine.unload_adapter(_ADAPTER)
    scores = {name: _score(spec, environment, reporter, played) for name, played in episodes.items()}
    pairs = [
        (row, one.reward, other.reward)
        for row, (one, other) in enumerate(zip(scores[None], scores[_ADAPTER], strict=True))
        if one.reward is not None and other.reward is not None
    ]
    if len(pairs) < count:
        first = next((score.error for both in scores.values() for score in both if score.error), "no reward")
        reporter.warn(
            "evaluation", f"{count - len(pairs)} of {count} held-out rows could not be scored and don't count: {first}"
        )
    if not pairs:
        raise InvalidInput("no held-out row could be scored")
    for row, base_reward, adapter_reward in pairs[:_SAMPLES]:
        reporter.sample(
            step,
            {
                "kind": "eval",
                "prompt": episodes[None][row].opening,
                "base": episodes[None][row].raw,
                "adapter": episodes[_ADAPTER][row].raw,
                "base_reward": base_reward,
                "adapter_reward": adapter_reward,
            },
        )
    report = EvalReport(
        base=sum(reward for _, reward, _ in pairs) / len(pairs),
        adapter=sum(reward for _, _, reward in pairs) / len(pairs),
        n=len(pairs),
    )
    reporter.evaluation(report)
    return report


# --- playing episodes ---------------------------------------------------------------------------------


@dataclass
class _Episode:
    index: int
    opening: list[Message]
    max_turns: int
    messages: list[Message]
    turns: int = 0
    done: bool = False
    raw: str = ""
    thinking: str = ""
    answer: str = ""
    final_text: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)


def _play(
    spec: RunSpec,
    base: BaseModel,
    engine: Engine,
    environment: EnvironmentClient,
    reporter: Reporter,
    count: int,
    *,
    adapter: str | None,
) -> list[_Episode]:
    """One greedy episode a row; all unfinished episodes take each turn together."""
    renderer = ChatRenderer(base.tokenizer, thinking=spec.thinking)
    multi_turn = environment.info().multi_turn
    episodes = [
        _Episode(index, list(start.messages), start.max_turns, list(start.messages))
        for index, start in enumerate(environment.start(SPLIT, range(count), seed=spec.seed))
    ]
    action_tokens = spec.train.max_tokens or defaults_for("grpo", spec.model).max_tokens[spec.thinking]
    while playing := [episode for episode in episodes if not episode.done]:
        requests, able = [], []
        prompts = [(episode.messages, f"row {episode.index + 1} of split {SPLIT!r}") for episode in playing]
        for episode, prompt in zip(playing, renderer.render_prompts(prompts), strict=True):
            room = base.context_length - len(prompt)
            if room < 1:
                episode.done = True
                continue
            sampling = Sampling(
                max_tokens=min(action_tokens, room), temperature=0.0, stop=spec.train.stop_sequences or ()
            )
            requests.append(Request(tuple(prompt), sampling, adapter=adapter))
            able.append(episode)
        for episode, completions in zip(able, engine.generate(requests), strict=True):
            episode.raw = renderer.answer_text(completions[0].tokens, base.stop_ids)
            episode.thinking, episode.answer = renderer.split_thinking(episode.raw)
            _take_turn(spec, environment, episode, multi_turn)
            reporter.progress()
    return episodes


def _take_turn(spec: RunSpec, environment: EnvironmentClient, episode: _Episode, multi_turn: bool) -> None:
    # as in rollouts and in a chat client: later turns see the answer, not the trace
    episode.messages.append({"role": "assistant", "content": episode.answer})
    episode.turns += 1
    if not multi_turn:
        episode.done = True
        return
    result = environment.step(SPLIT, episode.index, list(episode.messages), episode.answer, seed=spec.seed)
    episode.steps.append(result.metadata)
    episode.messages.extend(result.messages)
    episode.final_text = result.final_response_text
    episode.done = result.done or episode.turns >= episode.max_turns


def _score(
    spec: RunSpec, environment: EnvironmentClient, reporter: Reporter, episodes: Sequence[_Episode]
) -> list[Score]:
    def score(episode: _Episode) -> Score:
        finished = FinishedEpisode(
            messages=episode.messages,
            response_text=episode.answer if episode.final_text is None else episode.final_text,
            raw=episode.raw,
            thinking=episode.thinking,
            metadata={"steps": episode.steps} if episode.steps else {},
        )
        try:
            result = environment.score(SPLIT, episode.index, [finished], seed=spec.seed)[0]
        except FlashError as error:  # user code or its host: this row has no reward
            result = Score(reward=None, error=str(error))
        reporter.progress()
        return result

    with ThreadPoolExecutor(_SCORERS) as pool:
        return list(pool.map(score, episodes))
