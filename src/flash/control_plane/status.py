"""A run in words and as `RunStatus`: what happened, what comes next.

Pure functions of what storage and the settings say.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from flash.control_plane.estimating import cost_usd, estimated_usd
from flash.control_plane.settings import ServerSettings
from flash.records import (
    AttemptState,
    AttemptView,
    Checkpoint,
    FailureKind,
    ManagedView,
    Phase,
    Priority,
    RunState,
    RunStatus,
    RunSummary,
)
from flash.storage.runs import AttemptRow, RunRow

FAILURE_WORDS = {
    FailureKind.USER_CODE: "the environment's code failed",
    FailureKind.INVALID_INPUT: "the run's input can't be used",
    FailureKind.OUT_OF_MEMORY: "the device ran out of memory",
    FailureKind.INFRASTRUCTURE: "the worker was lost",
    FailureKind.STALL: "the worker made no progress",
    FailureKind.PREEMPTED: "the worker was told to leave its machine",
    FailureKind.WALL_CLOCK: "the run reached its time limit",
    FailureKind.INTERNAL: "Flash itself failed",
}


def summarise(
    run: RunRow,
    attempts: Sequence[AttemptRow],
    checkpoints: Sequence[Checkpoint],
    *,
    now: float,
    ahead: int = 0,
    settings: ServerSettings,
) -> tuple[str, str]:
    """`summary` and `next`. `ahead`: runs of its org that wait for a device before this one."""
    last = attempts[-1] if attempts else None
    if run.state is RunState.DONE:
        served = f"serve it with `flash deploy {run.id}`, or copy it out with `flash export`"
        return _done(run, checkpoints), served if run.collected_at is None else _gone(run)
    if run.state is RunState.FAILED:
        message = (run.error or {}).get("message") or "the run failed"
        return f"failed{_at(run)}: {message}", _after_end(run, checkpoints)
    if run.state is RunState.CANCELLED:
        return f"cancelled{_at(run)}", _after_end(run, checkpoints)
    if run.desired == "cancel":
        what = "waiting for the worker to save a checkpoint and stop" if _live(last) else "stopping"
        return f"cancel requested{_at(run)}", what
    if run.state is RunState.QUEUED:
        return _queued(run, last, checkpoints, now=now, ahead=ahead, settings=settings)
    if run.state is RunState.PROVISIONING:
        device = last.device if last else "a device"
        return f"starting a worker on {device}{_again(last)}", "it prepares the environment and loads the model"
    return _running(run, last, checkpoints)


def _done(run: RunRow, checkpoints: Sequence[Checkpoint]) -> str:
    scores = ""
    if run.eval and isinstance(run.eval.get("adapter"), int | float):
        base, adapter, n = run.eval.get("base"), run.eval["adapter"], run.eval.get("n")
        before = f" (base {base:.3f})" if isinstance(base, int | float) else ""
        scores = f"; held-out reward {adapter:.3f}{before} on {n} rows"
    step = checkpoints[-1].step if checkpoints else run.step
    return f"done after {step} steps{scores}"


def _after_end(run: RunRow, checkpoints: Sequence[Checkpoint]) -> str:
    if run.collected_at is not None:
        return _gone(run)
    if not checkpoints:
        return f"no checkpoint was saved; `flash retry {run.id}` starts it again"
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.has_state]
    if not whole:
        return f"of its checkpoints only the adapters are still kept (keep_state_days): {from_adapter(checkpoints)}"
    return f"its checkpoints are kept: `flash retry {run.id}` goes on from {whole[-1].ref}"


def _gone(run: RunRow) -> str:
    return f"{files_removed(run)}; submit its config again for another run"


def files_removed(run: RunRow) -> str:
    """When a collected run's files went, and who had wished so."""
    wish = "as `flash keep --days` asked" if run.ttl_s is not None else "by the server's keep_files_days"
    return f"its files were removed on {time.strftime('%Y-%m-%d', time.gmtime(run.collected_at))}, {wish}"


def from_adapter(checkpoints: Sequence[Checkpoint]) -> str:
    """The way on from a run of which only adapters are left."""
    return f'start a new run from the newest with train.init_from_adapter = "{checkpoints[-1].ref}"'


def _queued(
    run: RunRow,
    last: AttemptRow | None,
    checkpoints: Sequence[Checkpoint],
    *,
    now: float,
    ahead: int,
    settings: ServerSettings,
) -> tuple[str, str]:
    happened = "queued"
    if last is not None and last.failure is not None:
        words = FAILURE_WORDS[last.failure]
        happened = f"attempt {last.epoch} ended: {last.message or words}"
    place = f"from step {checkpoints[-1].step}" if checkpoints else "from the start"
    wait = backoff_left(run.retry_at, now, settings)
    if last is not None and wait > 0:
        return happened, f"attempt {last.epoch + 1} starts {place} in {wait:.0f} s"
    queue = "waiting for a free device" if ahead == 0 else f"waiting for a device behind {ahead} other run(s)"
    return happened, queue if last is None else f"{queue}; attempt {last.epoch + 1} starts {place}"


def _running(run: RunRow, last: AttemptRow | None, checkpoints: Sequence[Checkpoint]) -> tuple[str, str]:
    if last is not None and last.stop_reason == "wall_clock":
        return "the run reached its time limit", "it saves a checkpoint and ends"
    phase = run.phase or Phase.STARTING
    of = f" of {run.total_steps}" if run.total_steps else ""
    kept = f"; newest checkpoint at step {checkpoints[-1].step}" if checkpoints else ""
    if phase is Phase.TRAINING:
        return f"training, step {run.step}{of}{_again(last)}{kept}", "it trains on, then compares with the base"
    following = {
        Phase.STARTING: "it prepares the environment",
        Phase.PREPARING_ENVIRONMENT: "it loads the model",
        Phase.LOADING_MODEL: "it prepares the data",
        Phase.PREPARING_DATA: "training starts",
        Phase.EVALUATING: "it uploads what is left and ends",
        Phase.UPLOADING: "it ends when the last checkpoint is safe",
        Phase.FINISHED: "its worker is ending",
    }
    return f"{phase.value}{_again(last)}{kept}", following[phase]


def _at(run: RunRow) -> str:
    if run.step == 0:
        return ""
    return f" at step {run.step}" + (f" of {run.total_steps}" if run.total_steps else "")


def _again(last: AttemptRow | None) -> str:
    return f" (attempt {last.epoch})" if last is not None and last.epoch > 1 else ""


def _live(last: AttemptRow | None) -> bool:
    return last is not None and last.state is not AttemptState.ENDED


def backoff_left(retry_at: float | None, now: float, settings: ServerSettings) -> float:
    """Seconds until a retry may start, never more than the longest back-off: the wall clock may have jumped."""
    if retry_at is None:
        return 0.0
    left = retry_at - now
    return left if 0 < left <= settings.backoff_max_s + 1 else 0.0


def attempt_view(attempt: AttemptRow) -> AttemptView:
    return AttemptView(
        epoch=attempt.epoch,
        state=attempt.state,
        phase=attempt.phase,
        device=attempt.device,
        started_at=attempt.claimed_at or attempt.created_at,
        ended_at=attempt.ended_at,
        failure=attempt.failure,
        message=attempt.message,
    )


def run_status(
    run: RunRow,
    attempts: Sequence[AttemptRow],
    checkpoints: Sequence[Checkpoint],
    *,
    now: float,
    ahead: int,
    settings: ServerSettings,
    store_url: str,
    deployment: str | None = None,
) -> RunStatus:
    summary, following = summarise(run, attempts, checkpoints, now=now, ahead=ahead, settings=settings)
    final = next((found for found in reversed(checkpoints) if found.final), None)
    metrics = dict(run.metrics)
    if run.eval is not None:
        metrics["eval"] = run.eval
    return RunStatus(
        run_id=run.id,
        state=run.state,
        phase=run.phase,
        step=run.step,
        total_steps=run.total_steps,
        summary=summary,
        next=following,
        spec=run.spec,
        seed=run.seed,
        created_at=run.created_at,
        updated_at=run.updated_at,
        finished_at=run.finished_at,
        attempts=tuple(attempt_view(attempt) for attempt in attempts),
        metrics=metrics,
        checkpoints=tuple(checkpoint.ref for checkpoint in checkpoints),
        adapter_ref=final.ref if final else None,
        deployment=deployment,
        estimated_cost_usd=estimated_usd(run),
        cost_usd=cost_usd(run),
        error=run.error,
        warnings=tuple(run.warnings),
        retry_of=run.retry_of,
        priority=Priority.of(run.priority),
        managed=ManagedView(
            device=attempts[-1].device if attempts else None,
            wall_clock_limit_s=run.wall_clock_limit_s,
            retries=max(0, len(attempts) - 1),
            estimated_s=run.estimate["wall_clock_s"] if run.estimate else None,
            active_s=run.active_s,
            memory_needed_bytes=run.estimate["memory_bytes"] if run.estimate else None,
            artifact_uri=f"{store_url.rstrip('/')}/runs/{run.id}",
            pinned=run.pinned,
            kept_until=kept_until(run, settings),
            files_removed_at=run.collected_at,
            events_removed_at=run.silenced_at,
        ),
    )


def kept_until(run: RunRow, settings: ServerSettings) -> float | None:
    """When an ended run's files may go; None: it has not ended, or they stay."""
    own = run.ttl_s if run.ttl_s is not None else settings.times.files_s
    return None if run.finished_at is None or run.pinned or own is None else run.finished_at + own


def run_summary(run: RunRow) -> RunSummary:
    return RunSummary(
        run_id=run.id,
        state=run.state,
        phase=run.phase,
        step=run.step,
        total_steps=run.total_steps,
        model=str(run.spec.get("model", "")),
        algorithm=str(run.spec.get("algorithm", "")),
        environment=f"{run.environment_namespace}/{run.environment_name}",
        created_at=run.created_at,
        updated_at=run.updated_at,
    )
