"""`flash env check`: meets an environment the way a run would, and reports what a run would stop at.

Packs and opens the package, imports it, reads its rows, builds prompts and targets, and scores the gold answers.
It runs user code in this process. Rendering needs a tokenizer, which lives elsewhere: the caller passes it in.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash.environments.loading import LocalEnvironment
from flash.environments.package import pack, unpack
from flash.environments.protocol import FinishedEpisode, Message, Score, SFTTarget
from flash.errors import FlashError

EVAL_SPLIT = "eval"
MAX_PROMPTS = 200  # rows of a split whose prompt and target are built, spread over the whole split
MAX_SCORED = 64  # of those, rows whose gold answer is scored
THINK_END = "</think>"

Render = Callable[[list[Message], list[Message]], str]


@dataclass(frozen=True)
class GoldReport:
    """Scores of the gold answers: how many, their mean, how many got nothing, and what an empty answer gets."""

    scored: int
    mean: float
    zero: int
    empty_answer: float | None


@dataclass
class CheckReport:
    """`problems` end a run; `warnings` are for the author to judge. `details` are tracebacks, for `--debug`."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    files: tuple[str, ...] = ()
    size: int = 0  # bytes, compressed
    multi_turn: bool | None = None
    splits: dict[str, int] = field(default_factory=dict)  # rows by split, the run's own first
    prompt: list[Message] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    rendered: str | None = None
    gold: GoldReport | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    @contextmanager
    def step(self) -> Iterator[None]:
        """Turns an error into a problem; what depends on the step's result tests for it."""
        try:
            yield
        except FlashError as error:
            self.problems.append(str(error))
            if error.detail:
                self.details.append(error.detail)


def check(path: str | Path, params: Mapping[str, Any] | None = None, *, render: Render | None = None) -> CheckReport:
    """Checks the package at `path` as a run with these `environment.params` would meet it.

    `render(prompt, completion)` gives the text of one example with its trained part marked, and raises FlashError
    for what the model's template refuses. What user code prints goes to stderr.
    """
    report = CheckReport()
    with tempfile.TemporaryDirectory(prefix="flash-check-") as scratch, contextlib.redirect_stdout(sys.stderr):
        folder = Path(scratch) / "package"
        environment: LocalEnvironment | None = None
        with report.step():
            package = pack(path)
            report.files, report.size = package.files, package.size
            report.warnings.extend(package.notes)
            unpack(package.data, folder)
            environment = LocalEnvironment(folder, params, Path(scratch) / "work")
        if environment is not None:
            try:
                _check_environment(environment, report, render)
            finally:
                environment.close()
    return report


def _check_environment(environment: LocalEnvironment, report: CheckReport, render: Render | None) -> None:
    info = environment.info()
    report.multi_turn = info.multi_turn
    report.warnings.extend(info.warnings)
    own: str | None = None
    with report.step():
        rows = environment.rows()
        own = rows.split
        report.splits[own] = rows.count
        report.warnings.extend(rows.warnings)
    for split in info.splits:
        if split != own:
            with report.step():
                rows = environment.rows(split)
                report.splits[split] = rows.count
                report.warnings.extend(warning for warning in rows.warnings if warning not in report.warnings)
    for split in [own, EVAL_SPLIT]:
        if split in report.splits and (split == own or own != EVAL_SPLIT):
            with report.step():
                _check_split(environment, split, report, render if split == own else None)


def _check_split(environment: LocalEnvironment, split: str, report: CheckReport, render: Render | None) -> None:
    """Prompts, targets and gold scores of one split; the run's own split fills the report."""
    count = report.splits[split]
    indices = spread(count, MAX_PROMPTS)
    targets = environment.targets(split, indices)
    environment.start(split, indices, seed=0)
    first = not report.prompt
    if first:
        report.prompt, report.completion = targets[0].prompt, targets[0].completion
    if render is not None:
        texts = [render(target.prompt, target.completion) for target in targets]
        report.rendered = texts[0]
    labelled = [(index, target) for index, target in zip(indices, targets, strict=True) if gold_text(target)]
    if len(labelled) < len(indices):
        report.warnings.append(
            f"split {split!r}: {len(indices) - len(labelled):,} of {len(indices):,} rows looked at have no gold "
            "answer; SFT has nothing to learn from them"
        )
    if labelled:
        gold = _score_gold(environment, split, labelled[:: max(1, len(labelled) // MAX_SCORED)][:MAX_SCORED], report)
        if first:
            report.gold = gold


def _score_gold(
    environment: LocalEnvironment, split: str, labelled: Sequence[tuple[int, SFTTarget]], report: CheckReport
) -> GoldReport | None:
    rewards: list[float] = []
    for index, target in labelled:
        [score] = environment.score(split, index, [_gold_episode(environment, split, index, target)], seed=0)
        if score.reward is None:
            report.problems.append(f"split {split!r} row {index}: the gold answer has no score: {score.error}")
            return None
        rewards.append(score.reward)
    zero = sum(reward == 0 for reward in rewards)
    if zero == len(rewards):
        report.problems.append(
            f"split {split!r}: all {len(rewards)} gold answers looked at score 0; the reward can't tell a right "
            "answer, or the gold answers are not in the form that it reads"
        )
    elif zero:
        report.warnings.append(f"split {split!r}: {zero} of {len(rewards)} gold answers looked at score 0")
    empty = _score_text(environment, split, labelled[0], "")
    if empty.error is not None:
        report.problems.append(f"an empty answer has no score: {empty.error}; models do give empty answers")
    elif empty.reward is not None and len(rewards) > zero and empty.reward >= max(rewards):
        report.warnings.append(f"an empty answer scores {empty.reward:g}, no less than the best gold answer")
    return GoldReport(len(rewards), sum(rewards) / len(rewards), zero, empty.reward)


def _score_text(environment: LocalEnvironment, split: str, labelled: tuple[int, SFTTarget], text: str) -> Score:
    index, target = labelled
    messages = [*target.prompt, {"role": "assistant", "content": text}]
    try:
        [score] = environment.score(split, index, [FinishedEpisode(messages, text)], seed=0)
    except FlashError as error:
        return Score(None, error=str(error))
    return score


def _gold_episode(environment: LocalEnvironment, split: str, index: int, target: SFTTarget) -> FinishedEpisode:
    """The gold completion as an episode; a multi-turn one is played through `step_episode`, action by action."""
    if not environment.info().multi_turn:
        raw = gold_text(target)
        return _episode([*target.prompt, *target.completion], raw, {}, None)
    messages, steps, raw, final = list(target.prompt), [], "", None
    for action in (m for m in target.completion if m["role"] == "assistant"):
        raw = action["content"] or ""
        messages.append(action)
        result = environment.step(split, index, list(messages), raw, seed=0)
        messages.extend(result.messages)
        steps.append(result.metadata)
        final = result.final_response_text
        if result.done:
            break
    return _episode(messages, raw, {"steps": steps}, final)


def _episode(messages: list[Message], raw: str, metadata: dict[str, Any], final: str | None) -> FinishedEpisode:
    thinking, _, answer = raw.rpartition(THINK_END)
    return FinishedEpisode(
        messages=messages,
        response_text=final if final is not None else answer.lstrip("\n"),
        raw=raw,
        thinking=thinking.removeprefix("<think>").strip(),
        metadata=metadata,
    )


def gold_text(target: SFTTarget) -> str:
    """The text of the target's last assistant message; empty when there is none to learn."""
    texts = [m["content"] for m in target.completion if m["role"] == "assistant" and m["content"]]
    return texts[-1] if texts else ""


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread over 0 … count-1."""
    if count <= most:
        return list(range(count))
    return [index * count // most for index in range(most)]
