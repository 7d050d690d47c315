"""GRPO: an adapter learns from rewards. Reads top to bottom like the paper.

    for each step: rows -> prompts -> groups of episodes -> rewards -> advantages -> one update

Departures from Shao et al. 2024: advantages are not divided by their spread and the loss is a sum over
tokens over a constant (Dr. GRPO); the sampler's log-probabilities stand for the old policy's, so an update
needs no extra pass; groups without a reward gradient are skipped; no pull towards the base unless asked for.

It sees an environment, a reporter and a directory. What a step does is decided by the spec, the seed and the
state that its checkpoint holds, so a resumed run is the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flash.config.run import RunSpec
from flash.environments.protocol import EnvironmentClient
from flash.errors import FlashError, InvalidInput, UserCodeError
from flash.inference.chat import ChatRenderer
from flash.inference.loading import BaseModel
from flash.inference.sampling import stream_key
from flash.inference.torch_engine import TorchEngine
from flash.records import Phase
from flash.training import samples
from flash.training.advantages import all_equal, spread
from flash.training.advice import Advisor, StepFacts
from flash.training.batches import epoch_order
from flash.training.checkpoints import ADAPTER, Provenance, read_state, write_checkpoint
from flash.training.fitting import MicroBatches, Reduced, with_less
from flash.training.optimizer import build_optimizer
from flash.training.policy import build_policy
from flash.training.reporter import Reporter
from flash.training.rollouts import Collected, Collector, Group, Limits, Prompt, Stopped
from flash.training.sft import TrainResult
from flash.training.updating import Updater

MAX_FAILED_SHARE = 0.2  # of a step's groups dropped because user code failed ...
MAX_FAILED_STEPS = 3  # ... so many steps running: the run fails
_PULSE_SECONDS = 1.0  # between signs of life while decoding


def train(
    spec: RunSpec,
    base: BaseModel,
    environment: EnvironmentClient,
    reporter: Reporter,
    *,
    work_dir: Path,
    resume_from: Path | None = None,
    init_from: Path | None = None,
    micro_batch_divisor: int = 1,
    environment_digest: str = "",
) -> TrainResult:
    """Trains one adapter and leaves its checkpoints under `work_dir/checkpoints`.

    `resume_from` is a checkpoint folder of this very run: training goes on as if it had never stopped.
    `init_from` is an adapter folder, of which only the weights are taken. Raises UserCodeError when the
    environment keeps failing, InvalidInput when no prompt fits, ModelError and OutOfMemory.
    """
    settings = spec.train
    steps = settings.steps or 1
    reporter.phase(Phase.PREPARING_DATA, total_steps=steps)
    if spec.recipe.lora_dropout:
        raise InvalidInput("this trainer has no dropout; the recipe's lora_dropout must be 0")
    _warn_of_no_gradient(spec, reporter)
    rows = environment.rows()
    for warning in rows.warnings:
        reporter.warn("rows", warning)

    policy = build_policy(
        base,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        seed=spec.seed,
        init_from=resume_from / ADAPTER if resume_from else init_from,
    )
    optimizer = build_optimizer(policy.parameters(), spec.recipe, learning_rate=settings.learning_rate)
    progress = _Progress()
    if resume_from:
        saved = read_state(resume_from)
        saved.restore_optimizer(optimizer)
        saved.restore_generators()
        progress = _Progress.resumed(saved.extra)
        reporter.log(f"resuming after step {progress.step}")

    engine = TorchEngine(base, divisor=micro_batch_divisor)
    collector = Collector(
        engine,
        environment,
        ChatRenderer(base.tokenizer, thinking=spec.thinking),
        limits_of(spec, base),
        split=rows.split,
        stop_ids=base.stop_ids,
        adapter=policy.name,
        multi_turn=environment.info().multi_turn,
    )
    micro = MicroBatches.planned(
        spec.recipe, policy, divisor=micro_batch_divisor, before=progress.micro_batches, warn=reporter.warn
    )
    updater = Updater(spec, policy, optimizer, micro_batches=micro)
    provenance = Provenance(spec, environment_digest, base.revision)
    pulse = _Pulse(reporter)
    checkpoint, saved_step, stopped = resume_from, progress.step, False

    reporter.phase(Phase.TRAINING, total_steps=steps)
    try:
        while progress.step < steps and not stopped:
            try:
                _step(spec, rows.count, collector, engine, updater, progress, reporter, pulse)
                progress.micro_batches = micro.reduced
            except Stopped:
                stopped = True
            final = progress.step == steps
            stopped = stopped or (not final and reporter.should_stop())
            due = final or stopped or progress.step % settings.save_every == 0
            if due and progress.step > saved_step:
                began = time.perf_counter()
                checkpoint = write_checkpoint(
                    work_dir,
                    step=progress.step,
                    policy=policy,
                    optimizer=optimizer,
                    provenance=provenance,
                    metrics=progress.metrics,
                    extra=asdict(progress),
                )
                saved_step = progress.step
                seconds = time.perf_counter() - began
                reporter.checkpoint(
                    checkpoint, step=progress.step, final=final, metrics=progress.metrics, seconds=seconds
                )
    finally:
        collector.close()
        engine.close()
    return TrainResult(progress.step, checkpoint, stopped)


def limits_of(spec: RunSpec, base: BaseModel) -> Limits:
    settings = spec.train
    return Limits(
        group_size=settings.group_size or 1,
        max_tokens=settings.max_tokens or 1,
        max_length=min(settings.max_length, base.context_length),
        temperature=1.0 if settings.temperature is None else settings.temperature,
        top_p=1.0 if spec.recipe.top_p is None else spec.recipe.top_p,
        stop=settings.stop_sequences or (),
        thinking_penalty=settings.thinking_length_penalty_coef or 0.0,
    )


@dataclass
class _Progress:
    """What a step leaves to the next one beside adapter and optimizer. JSON-ready: checkpoints keep it."""

    step: int = 0
    position: int = 0  # in the endless stream of shuffled rows
    too_long: list[int] = field(default_factory=list)  # rows whose prompt leaves no room for max_tokens
    failed_steps: int = 0  # running, with too many dropped groups
    micro_batches: Reduced | None = None
    advisor: Advisor = field(default_factory=Advisor)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step, times left out

    @classmethod
    def resumed(cls, extra: Mapping[str, Any]) -> _Progress:
        return cls(**{**extra, "advisor": Advisor(**extra["advisor"])})


class _Pulse:
    """The engine's `watch`: tells the reporter that something moves, and asks it whether to stop."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._last = -math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last >= _PULSE_SECONDS:
            self._last = now
            self._reporter.progress()
        return self._reporter.should_stop()


# --- one step ---------------------------------------------------------------------------------------------


def _step(
    spec: RunSpec,
    row_count: int,
    collector: Collector,
    engine: TorchEngine,
    updater: Updater,
    progress: _Progress,
    reporter: Reporter,
    pulse: _Pulse,
) -> None:
    """Samples, scores and updates; raises Stopped, with everything as before, if asked to stop meanwhile."""
    step = progress.step + 1
    opened = _open_prompts(spec, row_count, step, collector, progress.position, set(progress.too_long))
    collected = with_less(
        partial(collector.collect, opened.prompts, pulse),
        what=f"sampling for step {step}",
        shrink=partial(_fewer_samples, engine),
        warn=reporter.warn,
    )
    kept = [group for group in collected.groups if group.error is None]
    errors = [*opened.errors, *(group.error for group in collected.groups if group.error is not None)]

    began = time.perf_counter()
    updated = updater.update(kept, step=step) if kept else {}
    update_seconds = time.perf_counter() - began

    progress.step = step
    progress.position = opened.position
    _note_too_long(spec, progress, opened.too_long, reporter)
    progress.metrics = {**_group_metrics(kept), **updated, **_reward_metrics(kept)}
    progress.metrics["groups_dropped"] = float(len(errors))
    progress.metrics["prompts_dropped"] = float(len(progress.too_long))
    reporter.metrics(step, {**progress.metrics, **_seconds(collected, update_seconds)})
    if samples.due(step, spec.train.steps):
        for sample in samples.rollouts(collected.groups, collector.decode):
            reporter.sample(step, sample)
    for code, text in progress.advisor.observe(_facts(spec, kept, progress.metrics)) if kept else ():
        reporter.warn(code, text)
    _bound_failures(step, errors, len(kept), progress, reporter)
    reporter.progress()


def _fewer_samples(engine: TorchEngine) -> str | None:
    rows = engine.shrink()
    return None if rows is None else f"going on with {rows} samples at a time"


@dataclass(frozen=True)
class _Opened:
    prompts: list[Prompt]
    errors: list[FlashError]
    too_long: list[int]
    position: int


def _open_prompts(
    spec: RunSpec, row_count: int, step: int, collector: Collector, position: int, known: set[int]
) -> _Opened:
    """The step's prompts: the next rows of the stream, those too long passed over.

    Raises InvalidInput once a whole pass over the rows finds none that fits.
    """
    wanted = spec.train.batch_size
    longest = collector.limits.max_length - collector.limits.max_tokens
    prompts: list[Prompt] = []
    errors: list[FlashError] = []
    too_long: list[int] = []
    while len(prompts) + len(errors) < wanted:
        missing = wanted - len(prompts) - len(errors)
        rows = [row_at(row_count, place, seed=spec.seed) for place in range(position, position + missing)]
        seeds = [stream_key(spec.seed, step, place) for place in range(position, position + missing)]
        position += missing
        fresh = [(row, seed) for row, seed in zip(rows, seeds, strict=True) if row not in known]
        found = collector.open([row for row, _ in fresh], [seed for _, seed in fresh], seed=seeds[0] >> 11)
        for (row, _), prompt in zip(fresh, found, strict=True):
            if isinstance(prompt, UserCodeError):
                errors.append(prompt)
            elif len(prompt.tokens) > longest:
                known.add(row)
                too_long.append(row)
            else:
                prompts.append(prompt)
        if len(known) >= row_count:
            raise InvalidInput(
                f"none of the {row_count:,} prompts leaves room for an answer: train.max_length = "
                f"{collector.limits.max_length} must hold it and train.max_tokens = {collector.limits.max_tokens}",
                remedy="raise train.max_length, or lower train.max_tokens",
            )
    return _Opened(prompts, errors, too_long, position)


def row_at(row_count: int, place: int, *, seed: int) -> int:
    """The row at a place of an endless stream: every pass over the rows is a fresh seeded shuffle."""
    epoch, offset = divmod(place, row_count)
    return int(epoch_order(row_count, seed, epoch)[offset])


def _note_too_long(spec: RunSpec, progress: _Progress, rows: Sequence[int], reporter: Reporter) -> None:
    if rows and not progress.too_long:
        reporter.warn(
            "prompts_dropped",
            f"prompts that leave no room for max_tokens = {spec.train.max_tokens} within max_length = "
            f"{spec.train.max_length} are dropped and counted; row {rows[0]} is the first "
            "(raise train.max_length to keep them)",
        )
    progress.too_long.extend(rows)


def _bound_failures(
    step: int, errors: Sequence[FlashError], kept: int, progress: _Progress, reporter: Reporter
) -> None:
    """Reports the groups that user code cost; raises UserCodeError once there are too many for too long."""
    total = kept + len(errors)
    over = bool(errors) and len(errors) > MAX_FAILED_SHARE * total
    progress.failed_steps = progress.failed_steps + 1 if over else 0
    if not errors:
        return
    last = errors[-1]
    reporter.log(f"step {step}: {len(errors)} of {total} groups dropped: {last.message}\n{last.detail or ''}".rstrip())
    if "groups_dropped" not in progress.advisor.said:
        progress.advisor.said.append("groups_dropped")
        reporter.warn(
            "groups_dropped", f"{len(errors)} of {total} groups of step {step} have no reward: {last.message}"
        )
    if progress.failed_steps >= MAX_FAILED_STEPS:
        raise UserCodeError(
            f"more than {MAX_FAILED_SHARE:.0%} of the groups failed in {MAX_FAILED_STEPS} steps running: "
            f"{last.message}",
            remedy=last.remedy or "fix the environment; `flash env check` runs its reward on the gold answers",
            detail=last.detail,
        )


# --- what people see ------------------------------------------------------------------------------------------


def _group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths over all kept episodes; `entropy` is the sampled estimate, in nats a token."""
    episodes = [episode for group in groups for episode in group.episodes]
    if not episodes:
        return {}
    rewards = [reward for group in groups for reward in group.rewards]
    sampled = sum(episode.sampled_tokens for episode in episodes)
    return {
        "reward": math.fsum(rewards) / len(rewards),
        "reward_std": spread(rewards),
        "equal_groups": sum(all_equal(group.rewards) for group in groups) / len(groups),
        "length": sampled / len(episodes),
        "truncated": sum(episode.truncated for episode in episodes) / len(episodes),
        "entropy": -math.fsum(value for episode in episodes for value in episode.logprobs) / max(sampled, 1),
        "turns": sum(episode.turns for episode in episodes) / len(episodes),
        "tokens": float(sampled),
    }


def _reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The environment's own metrics, and its share of successes, averaged over the episodes that have them."""
    values: dict[str, list[float]] = {}
    for score in (score for group in groups for score in group.scores):
        for name, value in score.metrics.items():
            values.setdefault(f"env/{name}", []).append(value)
        if score.success is not None:
            values.setdefault("success", []).append(float(score.success))
    return {name: math.fsum(each) / len(each) for name, each in sorted(values.items())}


def _seconds(collected: Collected, update_seconds: float) -> dict[str, float]:
    total = collected.sampling_seconds + collected.scoring_seconds + update_seconds
    tokens = sum(episode.sampled_tokens for group in collected.groups for episode in group.episodes)
    return {
        "seconds": total,
        "seconds_sampling": collected.sampling_seconds,
        "seconds_scoring": collected.scoring_seconds,
        "seconds_update": update_seconds,
        "tokens_per_s": tokens / max(total, 1e-9),
    }


def _facts(spec: RunSpec, groups: Sequence[Group], metrics: Mapping[str, float]) -> StepFacts:
    rewards = [reward for group in groups for reward in group.rewards]
    return StepFacts(
        lowest_reward=min(rewards),
        highest_reward=max(rewards),
        truncated=metrics["truncated"],
        kl=metrics["kl"],
        max_tokens=spec.train.max_tokens or 0,
    )


def _warn_of_no_gradient(spec: RunSpec, reporter: Reporter) -> None:
    if spec.train.group_size == 1:
        reporter.warn("no_gradient", "group_size = 1: a lone completion equals its group's mean, so nothing is learnt")
    if spec.train.temperature == 0:
        reporter.warn("no_gradient", "temperature = 0: all completions of a group are the same, so nothing is learnt")
