"""Every lever of `levers` but the scripts, in one process: steps with and without it in turn.

No lever is an option, so each is taken away here by putting what one would write without it in its place. Reads a job
(JSON on stdin), prints one JSON line: by lever and work, how many times as long a step takes without it; or, with the
job's `only`, the seconds of a step of each of these works.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flash_side
import torch
from exact_match import reward
from flash_side import Clock, Questions, loaded, made_up, spec_of

from flash.environments.protocol import SFTTarget
from flash.inference import decoding, torch_engine
from flash.inference.lanes import ONE_LANE, balanced
from flash.training import grpo, policy, rollouts, sft, updating

SLOW_S = 0.02  # a reward that asks a sandbox or another model

Off = Callable[[], Sequence[AbstractContextManager[Any]]]


# --- the work ---------------------------------------------------------------------------------------------------


class Answered(Questions):
    """With answers to imitate."""

    def __init__(self, pairs: Sequence[tuple[str, str]], scored: Callable[[int, str], float] = made_up) -> None:
        super().__init__([question for question, _ in pairs], scored)
        self._answers = [answer for _, answer in pairs]

    def targets(self, split: str, indices: Sequence[int]) -> list[SFTTarget]:
        return [
            SFTTarget(start.messages, [{"role": "assistant", "content": self._answers[index]}])
            for index, start in zip(indices, self.start(split, indices, seed=0), strict=True)
        ]


@cache
def arithmetic(folder: str) -> list[tuple[str, str]]:
    lines = (Path(folder) / "dataset" / "train.jsonl").read_text().splitlines()
    return [(row["input"], row["output"]) for row in map(json.loads, lines[:1024])]


def environment(job: Mapping[str, Any], work: str) -> Questions:
    pairs = arithmetic(job["environment"])
    if work == "SFT of mixed lengths":
        return Answered([(asked, "so, " * (3 * n % 48) + told) for n, (asked, told) in enumerate(pairs)])
    if work == "GRPO of short answers":
        return Answered(pairs, lambda index, completion: reward(completion, pairs[index][1]))
    if work == "GRPO of slow rewards":
        return Answered(pairs, slow)
    return Answered(pairs)


def slow(index: int, completion: str) -> float:
    time.sleep(SLOW_S / 8)  # of a group of eight
    return made_up(index, completion)


def step_seconds(job: Mapping[str, Any], work: str) -> float:
    """The median step's, the first one left out."""
    algorithm = "sft" if work.startswith("SFT") else "grpo"
    steps = {"epochs": 1000, "max_steps": job["steps"]} if algorithm == "sft" else {"steps": job["steps"]}
    if algorithm == "sft":
        steps["max_steps"] *= 4  # they are short
    spec = spec_of({**job["train"], **job["works"][work], **steps}, algorithm=algorithm)
    clock, base = Clock(), loaded(job, endless=work != "GRPO of short answers")
    with tempfile.TemporaryDirectory() as folder:
        train = sft.train if algorithm == "sft" else grpo.train
        train(spec, base, environment(job, work), clock, work_dir=Path(folder))
    return statistics.median(after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False))


# --- what one would write without a lever -----------------------------------------------------------------------


def together(model: Any, cpus: int) -> Any:
    """Both cores share every product."""
    torch.set_num_threads(cpus)
    return ONE_LANE


_logprobs = policy.Policy.logprobs


def everywhere(self: policy.Policy, batch: Any, **how: Any) -> torch.Tensor:
    """Last layer and head at all positions that are computed, trained or not."""
    tokens = batch.tokens_B_T.view(-1)
    targets = tokens.roll(-1)
    targets[batch.predictors_N] = batch.targets_N  # a row's last one is not among the tokens
    whole = dataclasses.replace(
        batch, predictors_N=torch.arange(len(tokens), device=tokens.device), targets_N=targets
    )
    return _logprobs(self, whole, **how)[batch.predictors_N]


def in_order(policy: Any, rows: Any, indices: Any, token_budget: int) -> list[list[Any]]:
    """Rows as they come, padded to the longest of the lane's."""
    chosen = [rows[int(index)] for index in indices]
    return [[chosen[part.start : part.stop]] for part in balanced([1] * len(chosen), policy.base.lanes.count)]


def all_episodes(self: updating.Updater, groups: Sequence[Any]) -> list[updating.Row]:
    """The pull from the base on every episode of the groups that are asked."""
    return [updating.Row(episode, 0.0) for group in groups for episode in group.episodes]


_requests = rollouts.Collector._requests


def request_a_sample(self: rollouts.Collector, live: Any) -> Any:
    requests, owners = _requests(self, live)
    single = [
        dataclasses.replace(request, n=1, sampling=dataclasses.replace(request.sampling, seed=seed))
        for request in requests
        for seed in range(request.sampling.seed, request.sampling.seed + request.n)
    ]
    return single, [[owner] for each in owners for owner in each]


_gradient = updating.Updater._gradient


def with_old_policy(self: updating.Updater, rows: Any, probes: Any, groups: Any) -> Any:
    """A pass for the old policy's log-probabilities before the one that trains."""
    self._logprobs(self._shares(rows), reference=False)
    return _gradient(self, rows, probes, groups)


def at_once(self: rollouts.Collector, group: Any, scoring: dict[Any, Any]) -> None:
    """Sampling waits for each group's rewards."""
    if group.error is None and all(episode.finished for episode in group.episodes):
        done: Future[Any] = Future()
        done.set_result(self._score(group))
        scoring[done] = group


LEVERS: dict[str, tuple[tuple[str, ...], Off]] = {
    "lanes": (("SFT", "GRPO"), lambda: [patch.object(flash_side, "share_cpus", together)]),
    "lean forward": (("SFT", "GRPO"), lambda: [patch.object(policy, "lean_forward", lambda base: None)]),
    "copied weights in sampling": (("GRPO",), lambda: [patch.object(decoding, "_may_be_copied", lambda model: False)]),
    "trained tokens only": (("SFT", "GRPO"), lambda: [patch.object(policy.Policy, "logprobs", everywhere)]),
    "bucketed lengths": (("SFT of mixed lengths",), lambda: [patch.object(sft, "_shares", in_order)]),
    "shared openings": (("SFT", "GRPO"), lambda: [patch.object(policy.Policy, "shares_openings", False)]),
    "the base beside the update": (("GRPO",), lambda: [
        patch.object(policy.Policy, "bare_forward", None), patch.object(updating.Updater, "_probes", all_episodes),
    ]),
    "one prefill a group": (("GRPO",), lambda: [patch.object(rollouts.Collector, "_requests", request_a_sample)]),
    "samples that agree": (("GRPO", "GRPO of short answers"), lambda: [
        patch.object(decoding.RowDecoder, "forks_cheaply", False)
    ]),
    "finished rows leave": (("GRPO of short answers",), lambda: [patch.object(torch_engine, "_RETIRE_PARTS", 0)]),
    "sampler's log-probs": (("GRPO",), lambda: [patch.object(updating.Updater, "_gradient", with_old_policy)]),
    "equal groups skipped": (
        ("GRPO of short answers",), lambda: [patch.object(updating, "all_equal", lambda rewards: False)]
    ),
    "scoring beside sampling": (
        ("GRPO of slow rewards",), lambda: [patch.object(rollouts.Collector, "_score_if_finished", at_once)]
    ),
}  # fmt: skip


def main() -> None:
    job = json.load(sys.stdin)
    if "only" in job:
        print(json.dumps({work: step_seconds(job, work) for work in job["only"]}))
        return
    ratios: dict[str, dict[str, list[float]]] = {lever: {w: [] for w in works} for lever, (works, _) in LEVERS.items()}
    for work in job["works"]:
        step_seconds(job, work)  # warms up
    for _ in range(job["pairs"]):
        for lever, (works, off) in LEVERS.items():
            for work in works:
                with ExitStack() as stack:
                    for change in off():
                        stack.enter_context(change)
                    without = step_seconds(job, work)
                ratios[lever][work].append(without / step_seconds(job, work))
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
