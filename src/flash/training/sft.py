"""Supervised fine-tuning: imitate the environment's target completions.

Reads top to bottom: rows -> rendered targets -> steps -> checkpoints. The loss is the mean negative
log-likelihood of the trained tokens of a whole optimizer batch, so long answers weigh more than short
ones and no split into micro-batches changes the gradient. Knows no storage and no network: it meets the
environment through `EnvironmentClient` and the world through `Reporter`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from flash.config.run import RunSpec
from flash.environments.protocol import EnvironmentClient, Rows, SFTTarget
from flash.errors import FlashError, InvalidInput
from flash.inference.chat import ChatRenderer, RenderedTarget
from flash.inference.loading import BaseModel
from flash.records import Phase
from flash.training.batches import (
    OVERHEAD_TOKENS,
    Ints,
    MicroBatch,
    TokenRows,
    batch_indices,
    collate,
    common_opening,
    lane_batches,
    steps_per_epoch,
)
from flash.training.checkpoints import ADAPTER, Provenance, read_state, write_checkpoint
from flash.training.fitting import MicroBatches, Reduced
from flash.training.losses import negative_log_likelihood
from flash.training.optimizer import Gradients, build_optimizer, learning_rate, optimizer_step
from flash.training.policy import Policy, build_policy
from flash.training.prepared import PreparedRows
from flash.training.reporter import Reporter

HELD_OUT_SPLIT, HELD_OUT_ROWS = "eval", 200
_ROWS_PER_CALL = 256  # targets asked of the environment at once
K = TypeVar("K")
T = TypeVar("T")
Targets = Sequence[RenderedTarget]  # one micro-batch's


@dataclass(frozen=True)
class TrainResult:
    """`checkpoint` is the last one written; None only when the run was stopped before its first step."""

    step: int
    checkpoint: Path | None
    stopped: bool


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
    kept_rows: Path | None = None,
) -> TrainResult:
    """Trains one adapter and leaves its checkpoints under `work_dir/checkpoints`.

    `resume_from` is a checkpoint folder of this very run: training goes on as if it had never stopped.
    `init_from` is an adapter folder, of which only the weights are taken. `kept_rows` is a folder in which the token
    rows of large datasets are kept for the next run. Raises InvalidInput (rows that can't be trained on),
    UserCodeError, ModelError and OutOfMemory.
    """
    settings = spec.train
    if spec.recipe.lora_dropout:
        raise InvalidInput("this trainer has no dropout; the recipe's lora_dropout must be 0")
    torch.manual_seed(spec.seed)

    reporter.phase(Phase.PREPARING_DATA)
    renderer = ChatRenderer(base.tokenizer, thinking=spec.thinking)
    prepared = PreparedRows(kept_rows, spec, renderer, environment_digest)
    rows = _training_rows(spec, environment, renderer, reporter, work_dir, prepared)
    held_out = _held_out_rows(spec, environment, renderer, reporter, work_dir)

    weights_from = resume_from / ADAPTER if resume_from else init_from
    policy = build_policy(
        base, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=spec.seed, init_from=weights_from
    )
    parameters = policy.parameters()
    optimizer = build_optimizer(parameters, spec.recipe, learning_rate=settings.learning_rate)
    progress = _Progress()
    if resume_from:
        saved = read_state(resume_from)
        saved.restore_optimizer(optimizer)
        saved.restore_generators()
        progress = _Progress(step=saved.step, **saved.extra)
        reporter.log(f"resuming after step {saved.step}")

    total_steps = _total_steps(spec, len(rows))
    provenance = Provenance(spec, environment_digest, base.revision)
    micro = MicroBatches.planned(
        spec.recipe, policy, divisor=micro_batch_divisor, before=progress.micro_batches, warn=reporter.warn
    )
    checkpoint = resume_from

    reporter.phase(Phase.TRAINING, total_steps=total_steps)
    stopped = reporter.should_stop()
    while progress.step < total_steps and not stopped:
        started = time.perf_counter()
        step = progress.step + 1
        indices = batch_indices(len(rows), settings.batch_size, seed=spec.seed, step=step)
        rate = learning_rate(settings.learning_rate, spec.recipe, step=step, total_steps=total_steps)
        loss = micro.fitting(
            partial(_accumulate_gradients, policy, rows, indices, micro, reporter),
            rows.lengths[indices].tolist(),
            what=f"step {step}",
        )
        differentiated = time.perf_counter()
        norm = optimizer_step(
            optimizer, parameters, rate=rate, max_grad_norm=spec.recipe.max_grad_norm, step=step
        )
        ended = time.perf_counter()

        progress.step = step
        progress.tokens += int(rows.lengths[indices].sum())
        progress.examples += len(indices)
        progress.micro_batches = micro.reduced
        lasting = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "epoch": progress.examples / len(rows),
            "tokens": float(progress.tokens),
        }
        passing = {
            "seconds": ended - started,
            "seconds_optimizer": ended - differentiated,
            "tokens_per_s": float(rows.lengths[indices].sum()) / (ended - started),
        }
        reporter.metrics(step, lasting | passing)
        reporter.progress()

        final = step == total_steps
        stopped = not final and reporter.should_stop()
        if final or stopped or step % settings.save_every == 0:
            began = time.perf_counter()
            if held_out is not None:
                lasting["eval_loss"] = micro.fitting(
                    partial(_mean_loss, policy, held_out, micro, reporter),
                    held_out.lengths.tolist(),
                    what="the held-out loss",
                )
                seconds = time.perf_counter() - began
                reporter.metrics(step, {"eval_loss": lasting["eval_loss"], "seconds_held_out": seconds})
                began = time.perf_counter()
            checkpoint = write_checkpoint(
                work_dir,
                step=step,
                policy=policy,
                optimizer=optimizer,
                provenance=provenance,
                metrics=lasting,
                extra={name: value for name, value in vars(progress).items() if name != "step"},
            )
            seconds = time.perf_counter() - began
            reporter.checkpoint(checkpoint, step=step, final=final, metrics=lasting, seconds=seconds)
    return TrainResult(progress.step, checkpoint, stopped)


@dataclass
class _Progress:
    """What a resumed run goes on counting."""

    step: int = 0
    tokens: int = 0
    examples: int = 0
    micro_batches: Reduced | None = None


def _total_steps(spec: RunSpec, rows: int) -> int:
    steps = (spec.train.epochs or 1) * steps_per_epoch(rows, spec.train.batch_size)
    return min(steps, spec.train.max_steps) if spec.train.max_steps else steps


# --- rows to token rows -------------------------------------------------------------------------------


@dataclass
class _Tally:
    truncated: int = 0
    dropped: int = 0
    without_thinking: int = 0
    example: RenderedTarget | None = field(default=None, repr=False)


def _training_rows(
    spec: RunSpec,
    environment: EnvironmentClient,
    renderer: ChatRenderer,
    reporter: Reporter,
    work_dir: Path,
    prepared: PreparedRows,
) -> TokenRows:
    kept = prepared.find()
    if kept is not None:
        rows, told = kept
        found = Rows(told["split"], "", told["count"], tuple(told["warnings"]))
        tally = _Tally(told["truncated"], told["dropped"], told["without_thinking"], rows[0] if len(rows) else None)
        reporter.log(f"{len(rows):,} rows as an earlier run prepared them")
    else:
        found, tally = environment.rows(None, limit=spec.train.max_examples or 0), _Tally()
        rendered = _rendered(
            environment, found.split, found.count, renderer, spec.train.max_length, tally, reporter
        )
        rows = TokenRows.write(work_dir / "train.tokens", rendered)
        counts = {name: getattr(tally, name) for name in ("truncated", "dropped", "without_thinking")}
        prepared.keep(rows, {"split": found.split, "count": found.count, "warnings": found.warnings, **counts})
    _tell_of_rows(spec, found, rows, tally, renderer, reporter)
    return rows


def _tell_of_rows(
    spec: RunSpec, found: Rows, rows: TokenRows, tally: _Tally, renderer: ChatRenderer, reporter: Reporter
) -> None:
    """What a person should know of them; raises InvalidInput when none can be trained on."""
    for warning in found.warnings:
        reporter.warn("rows", warning)
    limit = spec.train.max_length
    if tally.truncated:
        reporter.warn(
            "truncated_rows",
            f"{tally.truncated} of {found.count} rows are longer than max_length = {limit} tokens and were cut off"
            " (raise train.max_length to train on all of them)",
        )
    if len(rows) == 0:
        raise InvalidInput(
            f"none of the {found.count} rows of split {found.split!r} has a trained token within"
            f" max_length = {limit}",
            remedy="raise train.max_length, or check the environment's sft_completion with `flash env check`",
        )
    if tally.dropped:
        reporter.warn(
            "dropped_rows", f"{tally.dropped} of {found.count} rows have no trained token and were left out"
        )
    if spec.thinking and tally.without_thinking:
        reporter.warn(
            "targets_without_thinking",
            f"thinking = true, but {tally.without_thinking} of {found.count} targets have no <think> trace:"
            " the model would learn to skip its reasoning (add traces, or set thinking = false)",
        )
    if tally.example is not None:
        reporter.log(f"one example as it is trained, trained tokens between ⟦ and ⟧:\n{renderer.marked(tally.example)}")


def _held_out_rows(
    spec: RunSpec,
    environment: EnvironmentClient,
    renderer: ChatRenderer,
    reporter: Reporter,
    work_dir: Path,
) -> TokenRows | None:
    """The eval split's rows, if there are any. Faults in them cost the held-out loss, never the run."""
    if HELD_OUT_SPLIT not in environment.info().splits:
        return None
    try:
        found = environment.rows(HELD_OUT_SPLIT, limit=HELD_OUT_ROWS)
        rendered = _rendered(
            environment, found.split, found.count, renderer, spec.train.max_length, _Tally(), reporter
        )
        rows = TokenRows.write(work_dir / "eval.tokens", rendered)
    except FlashError as error:
        reporter.warn("held_out_rows", f"no held-out loss will be reported: {error}")
        return None
    return rows if len(rows) else None


def _rendered(
    environment: EnvironmentClient,
    split: str,
    count: int,
    renderer: ChatRenderer,
    max_length: int,
    tally: _Tally,
    reporter: Reporter,
) -> Iterator[RenderedTarget]:
    """Every row of the split that has something to train on, in order.

    The environment makes the next targets while these are rendered; rendering is half Python, half tokenising, which
    leaves the interpreter to the other thread.
    """
    portions = [range(start, min(start + _ROWS_PER_CALL, count)) for start in range(0, count, _ROWS_PER_CALL)]
    asked = _ahead(1, ((portion, partial(environment.targets, split, portion)) for portion in portions))
    pairs = _ahead(2, ((targets, partial(_render, renderer, split, at, targets)) for at, targets in asked))
    for targets, rendered in pairs:
        for target, whole in zip(targets, rendered, strict=True):
            kept = whole.truncated(max_length)
            tally.truncated += kept is not whole
            tally.without_thinking += not _has_thinking(target)
            if max(kept.trained_from, 1) >= len(kept.tokens):
                tally.dropped += 1
                continue
            tally.example = tally.example or kept
            yield kept
        reporter.progress()


def _render(
    renderer: ChatRenderer, split: str, indices: Sequence[int], targets: Sequence[SFTTarget]
) -> list[RenderedTarget]:
    return renderer.render_targets([
        (target.prompt, target.completion, f"row {index + 1} of split {split!r}")
        for index, target in zip(indices, targets, strict=True)
    ])  # fmt: skip


def _ahead(threads: int, work: Iterable[tuple[K, Callable[[], T]]]) -> Iterator[tuple[K, T]]:
    """Each piece of work's label and result, in order; so many more are under way on threads while one is used."""
    with ThreadPoolExecutor(threads, thread_name_prefix="preparing") as pool:
        under_way: deque[tuple[K, Future[T]]] = deque()
        for label, piece in work:
            under_way.append((label, pool.submit(piece)))
            if len(under_way) > threads:
                label, future = under_way.popleft()
                yield label, future.result()
        for label, future in under_way:
            yield label, future.result()


def _has_thinking(target: SFTTarget) -> bool:
    return any(
        message.get("reasoning_content") or "<think>" in str(message.get("content"))
        for message in target.completion
        if message.get("role") == "assistant"
    )


# --- the loss -----------------------------------------------------------------------------------------


def _accumulate_gradients(
    policy: Policy, rows: TokenRows, indices: Ints, micro: MicroBatches, reporter: Reporter
) -> float:
    """Gives the parameters the batch's gradient; returns its mean loss per trained token."""
    for parameter in policy.parameters():
        parameter.grad = None  # of a pass that ran out of memory
    trained = rows.trained_tokens(indices)

    def accumulate(share: Sequence[Targets]) -> tuple[Tensor, Gradients]:
        total, gradients = torch.zeros((), device=policy.base.device), Gradients(policy.parameters())
        for chosen in share:
            batch = _collated(policy, chosen)
            loss = negative_log_likelihood(policy.logprobs(batch), normaliser=trained)
            gradients.add(loss)
            total += loss.detach()
            reporter.progress()
        return total, gradients

    total = torch.zeros((), device=policy.base.device)
    for part, gradients in _on_lanes(policy, accumulate, _shares(policy, rows, indices, micro.tokens)):
        gradients.apply()
        total += part
    return float(total)


def _mean_loss(policy: Policy, rows: TokenRows, micro: MicroBatches, reporter: Reporter) -> float:
    indices = np.arange(len(rows))
    trained = rows.trained_tokens(indices)

    @torch.no_grad()
    def loss(share: Sequence[Targets]) -> Tensor:
        total = torch.zeros((), device=policy.base.device)
        for chosen in share:
            batch = _collated(policy, chosen)
            total += negative_log_likelihood(policy.logprobs(batch), normaliser=trained)
            reporter.progress()
        return total

    return float(sum(_on_lanes(policy, loss, _shares(policy, rows, indices, micro.tokens))))


def _on_lanes(policy: Policy, work: Callable[[list[Targets]], T], shares: Sequence[list[Targets]]) -> list[T]:
    with policy.base.adapters.active(policy.name):
        return policy.base.lanes.run([partial(work, share) for share in shares])


def _shares(policy: Policy, rows: TokenRows, indices: Ints, token_budget: int) -> list[list[Targets]]:
    """For each lane its part of the rows, in micro-batches of like length under the token budget."""
    chosen = sorted((rows[int(index)] for index in indices), key=lambda row: -len(row.tokens))
    lanes = lane_batches(
        [row.tokens for row in chosen],
        lanes=policy.base.lanes.count,
        token_budget=token_budget,
        overhead_tokens=OVERHEAD_TOKENS.get(policy.base.device.type, OVERHEAD_TOKENS["cuda"]),
        shares_openings=policy.shares_openings,
    )
    return [[[chosen[number] for number in batch] for batch in lane] for lane in lanes]


def _collated(policy: Policy, rows: Targets) -> MicroBatch:
    return collate(
        [row.tokens for row in rows],
        [row.trained for row in rows],
        pad_id=policy.base.pad_id,
        device=policy.base.device,
        openings=_opening(rows) if policy.shares_openings else None,
    )


def _opening(rows: Targets) -> list[tuple[int, int]]:
    """What all rows begin with (a template's start, a system prompt): its length, and that the first row has it."""
    return [(0, common_opening([row.tokens for row in rows]))] * len(rows)
