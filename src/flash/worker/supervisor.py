"""The supervisor: one attempt from claim to last word. No torch here, and no user code.

`python -m flash.worker.supervisor` reads one JSON line from standard input, `{api_url, attempt_id, token,
work_dir, device}`, and nothing secret from anywhere else. It owns the order of things: claim; start the trainer
(its imports take longest) while the environment and the checkpoints are fetched; pass calls, reports and logs
between trainer, environment host and control plane; end all of it in time; name the failure; finish only after
every event is acknowledged and the last checkpoint verified. Knows nothing of models, algorithms or the database.

Exit status: 0 finished (whatever the outcome) · 3 the attempt no longer counts · 4 the plane can't be reached ·
2 the start line is unusable.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil

from flash.artifacts.manifests import Damaged, fetch_checkpoint
from flash.artifacts.signed import SignedStore
from flash.artifacts.store import Objects, Store, credentials
from flash.catalog.catalog import flash_home
from flash.config.run import RunSpec
from flash.environments.package import unpack
from flash.errors import (
    Conflict,
    FlashError,
    InternalError,
    InvalidInput,
    ModelError,
    NotFound,
    OutOfMemory,
    Unauthorized,
    Unavailable,
    UserCodeError,
    from_wire,
)
from flash.failpoints import MARK, failpoint
from flash.failpoints import VARIABLES as FAILPOINTS
from flash.launching.accounts import Account, account_of, remove_quarters
from flash.launching.lineage import adopt_orphans
from flash.records import Claim, EventKind, FailureKind, Finish, Manifest, Phase, SignRequest
from flash.redaction import Redactor
from flash.worker.api import WorkerApi, persist
from flash.worker.channel import Frame
from flash.worker.environment_host import MAX_LINE_BYTES, EnvironmentHost, HostBounds, HostSpec
from flash.worker.lease import Lease, Pulse
from flash.worker.packages import prepare
from flash.worker.reporting import AttemptSink, EventSpool, LogIntake, Sender, Warn
from flash.worker.settings import WorkerSettings
from flash.worker.trainer import OUT_OF_MEMORY_STATUS, is_full_disk
from flash.worker.trainer_process import (
    TRAINER,
    StandBy,
    TrainerProcess,
    trainer_environment,
    usable_cpus,
)
from flash.worker.uploading import LocalCheckpoint, Uploader
from flash.worker.wandb_sink import sinks_for

FINISHED, UNUSABLE, FENCED, UNREACHABLE = 0, 2, 3, 4
SinkFactory = Callable[[Claim, Path, WorkerSettings, Warn], Sequence[AttemptSink]]
_RELAYED = frozenset({EventKind.LOG, EventKind.WARNING, EventKind.METRICS, EventKind.EVAL, EventKind.SAMPLE})


@dataclass(frozen=True)
class Start:
    """The line on standard input."""

    api_url: str
    attempt_id: str
    token: str
    work_dir: str
    device: str

    def __repr__(self) -> str:
        return f"Start({self.attempt_id} on {self.device})"

    @classmethod
    def parse(cls, line: bytes) -> Start:
        names = [field.name for field in fields(cls)]
        try:
            given = json.loads(line)
            return cls(**{name: str(given[name]) for name in names})
        except (ValueError, KeyError, TypeError):
            raise InvalidInput(f"the start line must be a JSON object with {', '.join(names)}") from None


@dataclass(frozen=True)
class Place:
    """Where an environment lives, and as whom its host runs; None: as this process does."""

    folder: Path     # the package
    cache_dir: Path  # the packages that it wants
    work_dir: Path   # what it writes
    account: Account | None = None


@dataclass(frozen=True)
class Verdict:
    """How the attempt ended, as `finish` tells it."""

    outcome: str  # done | failed | cancelled
    failure: FailureKind | None = None
    error: FlashError | None = None


class GoneError(Exception):
    """This worker may not, or can't, say anything any more."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


# --- what happened: the messages of the main loop's inbox -----------------------------------------------


@dataclass(frozen=True)
class StopAsked:
    reason: str  # cancel | preempted


@dataclass(frozen=True)
class OutcomeReported:
    frame: Frame


@dataclass(frozen=True)
class TrainerExited:
    status: int


@dataclass(frozen=True)
class Broken:
    error: FlashError


@dataclass(frozen=True)
class Abandoned:
    gone: GoneError


Message = StopAsked | OutcomeReported | TrainerExited | Broken | Abandoned


# --- naming a failure -----------------------------------------------------------------------------------


def failure_of(error: FlashError) -> FailureKind:
    """The kind by which the reconciler decides on a retry."""
    if isinstance(error, UserCodeError):
        return FailureKind.USER_CODE
    if isinstance(error, OutOfMemory):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, InvalidInput | ModelError):
        return FailureKind.INVALID_INPUT
    if isinstance(error, Unavailable | NotFound):
        return FailureKind.INFRASTRUCTURE
    return FailureKind.INTERNAL


def verdict_on_exit(status: int, *, killed_for_memory: bool, last_lines: Sequence[str]) -> Verdict:
    """What a trainer's end means when it could not say so itself."""
    detail = "\n".join(last_lines) or None
    if killed_for_memory or status == OUT_OF_MEMORY_STATUS:
        memory = OutOfMemory("the trainer was stopped because memory ran out", detail=detail)
        return Verdict("failed", FailureKind.OUT_OF_MEMORY, memory)
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        lost = Unavailable(f"the trainer was killed by {name}", detail=detail)
        return Verdict("failed", FailureKind.INFRASTRUCTURE, lost)
    broken = InternalError(f"the trainer ended with status {status} before it could say why", detail=detail)
    return Verdict("failed", FailureKind.INTERNAL, broken)


# --- the attempt ------------------------------------------------------------------------------------------


class Supervisor:
    """One attempt. `run` is called once, on the main thread, and returns the exit status."""

    def __init__(
        self,
        start: Start,
        settings: WorkerSettings,
        environ: Mapping[str, str],
        *,
        trainer: Sequence[str] | StandBy = TRAINER,
        sinks: SinkFactory = lambda claim, work_dir, settings, warn: (),
    ) -> None:
        self._start = start
        self._settings = settings
        self._environ = environ
        self._trainer_program = trainer
        self._make_sinks = sinks
        self._work_dir = Path(start.work_dir)
        self._api = WorkerApi(start.api_url, start.attempt_id, start.token, settings)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()  # the one queue that signal handlers may use
        self._gone = threading.Event()
        self._pulse = Pulse()
        self._gate = threading.RLock()           # guards the three below; held while `_set_phase` shows what waited
        self._environment_ready = threading.Event()
        self._held_phases: list[dict[str, Any]] = []
        self._shown_phase: dict[str, Any] | None = None
        self._host: EnvironmentHost | None = None
        self._has_quarters = False               # a folder of the host's user, outside the work folder
        self._trainer: TrainerProcess | None = None
        self._uploader: Uploader | None = None
        self._sinks: list[AttemptSink] = []
        self._stopping: str | None = None        # cancel | preempted
        self._training_began = False
        self._outcome: Frame | None = None
        self._last_lines: list[str] = []         # of the trainer's output
        self._untold: FlashError | None = None   # why an event was lost: such an attempt is never `done`
        self._oom_kills = _oom_kills()

    def run(self) -> int:
        claimed_at = time.monotonic()
        try:
            claim = self._api.claim(pid=os.getpid(), device=self._start.device, stop=self._gone)
        except (Conflict, Unauthorized) as error:
            return _say(f"not ours: {error}", FENCED)
        except FlashError as error:
            return _say(f"no claim: {error}", UNREACHABLE)
        try:
            failpoint("supervisor.claimed")
            self._open_reporting(claim, claimed_at)
            try:
                self._begin()
                failpoint("supervisor.began")
                verdict = self._attend()
            except GoneError:
                raise
            except FlashError as error:
                verdict = Verdict("failed", failure_of(error), error)
            except Exception as error:
                verdict = Verdict("failed", FailureKind.INTERNAL, _defect("the supervisor failed", error))
            self._conclude(verdict)
        except GoneError as gone:
            return _say(str(gone), gone.status)
        finally:
            self._end_processes()
        return FINISHED

    def ask_to_stop(self, reason: str) -> None:
        """From a signal handler or any thread: checkpoint, then end."""
        self._inbox.put(StopAsked(reason))

    # --- setting up -----------------------------------------------------------------------------------

    def _open_reporting(self, claim: Claim, claimed_at: float) -> None:
        """Lease and events: from here on, whatever goes wrong can be told."""
        self._claim = claim
        keys = [*credentials(claim.store_options), self._start.token, self._environ.get("HF_TOKEN", "")]
        self._redactor = Redactor([*claim.secrets.values(), *keys])
        settings = self._settings
        self._lease = Lease(
            self._api,
            self._pulse,
            settings,
            epoch=claim.epoch,
            interval_s=claim.heartbeat_s,
            lease_s=claim.lease_s,
            claimed_at=claimed_at,
            on_cancel=lambda: self.ask_to_stop("cancel"),
            on_fenced=self._fenced,
            on_lost=lambda: self._abandon("the lease could not be renewed", UNREACHABLE),
        )
        self._lease.start()
        self._spool = EventSpool(self._work_dir / "spool" / "events.jsonl", self._redactor)
        self._sender = Sender(self._spool, self._api, claim.epoch, settings, on_fenced=self._fenced)
        self._sender.start()
        self._open_sinks()

    def _open_sinks(self) -> None:
        """Whoever else logs this run; one that can't start is a warning."""
        try:
            self._sinks += self._make_sinks(self._claim, self._work_dir, self._settings, self._warn)
        except Exception as error:
            self._warn("logger", f"the run is not logged elsewhere: {type(error).__name__}: {error}")
        for sink in self._sinks:
            self._spool.add_sink(sink)

    def _begin(self) -> None:
        """Everything else that runs beside the main loop: uploads, trainer, environment."""
        claim, settings = self._claim, self._settings
        self._spec = RunSpec.model_validate(claim.spec)
        self._store = self._open_store(claim)
        uploader = Uploader(
            self._store,
            self._api,
            claim.run_id,
            claim.epoch,
            settings,
            log=lambda text: self._log("supervisor", text),
            warn=lambda text: self._warn("upload", text),
            on_progress=self._pulse.advance,
            on_fenced=self._fenced,
        )
        if claim.resume_from is not None and claim.resume_from.final:
            uploader.final_step = claim.resume_from.step  # the attempt before got this far
        uploader.start()
        self._uploader = uploader
        self._set_phase({"phase": Phase.PREPARING_ENVIRONMENT.value})
        threads = settings.threads or usable_cpus()
        trainer_dir = self._work_dir / "trainer"
        trainer_dir.mkdir(parents=True, exist_ok=True)
        self._trainer = TrainerProcess(
            self._trainer_program,
            work_dir=trainer_dir,
            environment={
                **trainer_environment(self._environ, device=self._start.device, threads=threads),
                **self._marks(),
            },
            output=LogIntake(self._trainer_printed, self._redactor, settings),
            on_frame=self._on_frame,
            on_call=self._on_call,
            on_exit=lambda status: self._inbox.put(TrainerExited(status)),
        )
        self._in_background("environment", self._prepare_environment)
        self._in_background("job", lambda: self._send_job(threads))

    def _open_store(self, claim: Claim) -> Objects:
        if not claim.signed:
            return Store(claim.store_url, claim.store_options)
        return SignedStore(
            lambda verb, keys: self._api.sign(SignRequest(epoch=claim.epoch, verb=verb, keys=tuple(keys)))
        )

    def _marks(self) -> dict[str, str]:
        """What every process of the attempt inherits: its mark and, in tests, where to die or wait."""
        points = {name: self._environ[name] for name in FAILPOINTS if name in self._environ}
        return {MARK: self._start.attempt_id, **points}

    def _bounds(self) -> HostBounds:
        settings = self._settings
        own = {"memory_bytes": settings.host_memory_bytes} if settings.host_memory_bytes else {}
        return HostBounds(**own, processes=settings.host_processes)

    def _in_background(self, name: str, work: Callable[[], None]) -> None:
        """Runs a part of the preparation; its failure ends the attempt."""

        def run() -> None:
            try:
                work()
            except (Conflict, Unauthorized) as error:
                self._fenced(error)
            except FlashError as error:
                self._inbox.put(Broken(error))
            except Exception as error:
                self._inbox.put(Broken(_defect(f"preparing the {name} failed", error)))

        threading.Thread(target=run, name=name, daemon=True).start()

    def _prepare_environment(self) -> None:
        """Archive, folder, packages, host: in this order, and ready once user code is imported."""
        archive = self._patiently(self._api.environment_archive)
        place = self._place()
        shutil.rmtree(place.folder, ignore_errors=True)
        unpack(archive, place.folder)
        if place.account is not None:
            place.account.give(place.folder)
        self._pulse.advance()
        section = self._spec.environment
        python = prepare(
            section.pip, cache_dir=place.cache_dir, on_output=self._package_output, account=place.account
        )
        self._pulse.advance()
        declared = {name: self._claim.secrets[name] for name in section.secrets if name in self._claim.secrets}
        intakes = {
            name: LogIntake(lambda line: self._log("environment", line), self._redactor, self._settings)
            for name in ("stdout", "stderr")
        }
        host = EnvironmentHost(
            HostSpec(
                folder=place.folder,
                work_dir=place.work_dir,
                params=section.params,
                variables={**self._spec.worker_env, **declared, **self._marks()},
                python=python,
                bounds=self._bounds(),
                account=place.account,
            ),
            on_output=lambda stream, line: _feed_line(intakes[stream], line),
        )
        self._host = host
        host.start()
        failpoint("supervisor.ready")
        with self._gate:
            self._environment_ready.set()
            for held in self._held_phases or [{"phase": Phase.LOADING_MODEL.value}]:  # its imports are part of that
                self._set_phase(held)

    def _place(self) -> Place:
        """The work folder, or folders of the host's own user."""
        if self._claim.host_user is None:
            return Place(self._work_dir / "environment", flash_home() / "cache" / "environments", self._work_dir)
        account = account_of(self._claim.host_user)
        for epoch in range(1, self._claim.epoch):  # of attempts that were killed
            remove_quarters(f"{self._claim.run_id}.{epoch}")
        self._has_quarters = True
        root = account.quarters(self._start.attempt_id)
        work_dir = account.folder(root / "work")
        for name in ("home", "tmp"):
            account.folder(work_dir / name)
        return Place(root / "environment", root / "packages", work_dir, account)

    def _send_job(self, threads: int) -> None:
        """Fetches what the trainer starts from, and hands it the job."""
        claim = self._claim
        resume = self._fetch(claim.resume_from, "resume") if claim.resume_from else None
        init = self._fetch(claim.init_from, "init") if claim.init_from and not resume else None
        self._to_trainer(
            {
                "type": "job",
                "run_id": claim.run_id,
                "epoch": claim.epoch,
                "spec": claim.spec,
                "device": self._start.device,
                "threads": threads,
                "work_dir": str(self._work_dir),
                "resume_from": str(resume) if resume else None,
                "init_from": str(init / "adapter") if init else None,
                "micro_batch_divisor": claim.micro_batch_divisor,
                "environment_digest": claim.environment.sha256,
            }
        )

    def _fetch(self, manifest: Manifest, name: str) -> Path:
        """Raises Damaged when the store's bytes are not those that were recorded: the plane then looks further back."""
        folder = self._work_dir / name

        def fetch() -> Damaged | None:
            try:
                fetch_checkpoint(self._store, manifest, folder, "adapter" if name == "init" else None)
            except Damaged as error:
                return error  # asking again would bring the same bytes
            return None

        damage = self._patiently(fetch)
        if damage is not None:
            raise damage
        self._pulse.advance()
        return folder

    def _patiently(self, attempt: Callable[[], Any]) -> Any:
        """A download, repeated for a while when the other side is away."""
        return persist(
            attempt, self._settings, patience_s=self._settings.download_patience_s, stop=self._gone
        )

    # --- between trainer, host and plane ----------------------------------------------------------------

    def _on_call(self, method: str, params: dict[str, Any], timeout_s: float | None) -> Any:
        """A trainer's question to the environment; on a thread of the channel's own."""
        self._environment_ready.wait()
        assert self._host is not None
        answer = self._host.call(method, params, timeout_s)
        self._pulse.advance()
        # A score's own names and notes end up in metrics, and so in the adapter's files.
        return self._redactor.value(answer) if method == "score" else answer

    def _to_trainer(self, frame: Frame) -> None:
        if self._trainer is not None:
            self._trainer.send(frame)

    def _on_frame(self, frame: Frame) -> None:
        try:
            self._take_frame(frame)
        except Exception as error:  # else it would end the channel, and no one would know why
            self._inbox.put(Broken(_defect(f"a {frame.get('kind')} report could not be handled", error)))

    def _take_frame(self, frame: Frame) -> None:
        if frame.get("type") == "outcome":
            self._inbox.put(OutcomeReported(frame))
        elif frame.get("type") == "report":
            self._on_report(str(frame.get("kind")), frame.get("data") or {})

    def _on_report(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "phase":
            self._set_phase(data)
        elif kind == "checkpoint":
            self._pulse.advance(step=data["step"])
            assert self._uploader is not None
            self._uploader.submit(
                LocalCheckpoint(
                    Path(data["folder"]),
                    data["step"],
                    data["final"],
                    self._redactor.value(data.get("metrics") or {}),  # their names may be the environment's
                )
            )
        elif kind in _RELAYED:
            if kind == EventKind.LOG:
                data = {"stream": "trainer", "text": data.get("text", "")}
            else:
                self._pulse.advance(step=data.get("step"))
            self._tell(EventKind(kind), data)
        else:
            self._pulse.advance()
            if kind == "progress" and data.get("total_bytes"):
                self._show_download(data)

    def _show_download(self, data: dict[str, Any]) -> None:
        """A model's download as far as it is: the phase once more, with bytes, at each fiftieth."""
        done, total = int(data["done_bytes"]), int(data["total_bytes"])
        with self._gate:
            shown = self._shown_phase or {}
            if shown.get("phase") != Phase.LOADING_MODEL.value or shown.get("fiftieth") == 50 * done // total:
                return
            self._shown_phase = {**shown, "fiftieth": 50 * done // total}
        self._tell(EventKind.PHASE, {"phase": Phase.LOADING_MODEL.value, "done_bytes": done, "total_bytes": total})

    def _set_phase(self, data: dict[str, Any]) -> None:
        """Shows a phase; while the environment is being prepared, a trainer's own waits its turn."""
        phase = Phase(data["phase"])
        self._training_began |= phase is Phase.TRAINING
        with self._gate:
            if not self._environment_ready.is_set() and phase is not Phase.PREPARING_ENVIRONMENT:
                self._held_phases.append(data)
                self._pulse.advance()
                return
            shown = {"phase": phase.value, "total_steps": data.get("total_steps")}
            news, self._shown_phase = shown != self._shown_phase, shown
        self._pulse.advance(phase=phase)
        if news:
            self._tell(EventKind.PHASE, shown)

    def _log(self, stream: str, text: str) -> None:
        self._tell(EventKind.LOG, {"stream": stream, "text": text})

    def _warn(self, code: str, text: str) -> None:
        self._tell(EventKind.WARNING, {"code": code, "text": text})

    def _tell(self, kind: EventKind, data: dict[str, Any]) -> None:
        """Spools an event; a disk that takes no more ends the attempt, so that nothing is lost in silence."""
        try:
            self._spool.append(kind, data)
        except Unavailable as error:
            self._untold = error
            self._inbox.put(Broken(error))

    def _trainer_printed(self, line: str) -> None:
        self._last_lines = [*self._last_lines[-19:], line]
        self._log("trainer", line)

    def _package_output(self, line: str) -> None:
        self._pulse.advance()
        self._log("supervisor", line)

    # --- the main loop ----------------------------------------------------------------------------------

    def _attend(self) -> Verdict:
        """Until the trainer has ended, for whatever reason; raises GoneError when nothing may be said any more."""
        kill_at: float | None = None
        while True:
            match self._next(kill_at):
                case Abandoned(gone):
                    raise gone
                case Broken(error):
                    self._kill_trainer()
                    return self._cancelled() or Verdict("failed", failure_of(error), error)
                case OutcomeReported(frame):
                    self._outcome = frame
                    kill_at = time.monotonic() + self._settings.exit_grace_s
                case StopAsked(reason):
                    kill_at = self._stop(reason) if self._stopping is None else kill_at
                case TrainerExited(status):
                    return self._verdict(status)
                case None:  # its time is over
                    self._kill_trainer()
                    kill_at = None

    def _next(self, deadline: float | None) -> Message | None:
        """The next message, or None once the deadline has passed."""
        while True:
            if not self._lease.held:
                self._abandon("the lease ran out", UNREACHABLE)
            left = 0.5 if deadline is None else min(0.5, max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=max(left, 0.001))
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def _stop(self, reason: str) -> float:
        """Passes the wish on; returns when patience ends. Before any training there is nothing to save."""
        self._stopping = reason
        self._log("supervisor", "stopping: " + {"cancel": "cancelled"}.get(reason, "this machine is going away"))
        if not self._training_began:
            return time.monotonic()
        self._to_trainer({"type": "stop"})
        cancelled = reason == "cancel"
        return time.monotonic() + (self._settings.stop_grace_s if cancelled else self._settings.preempt_grace_s)

    def _verdict(self, status: int) -> Verdict:
        """From the trainer's own words if there are any, else from its exit."""
        outcome = self._outcome or {}
        said = outcome.get("outcome")
        if said == "done":
            return Verdict("done")
        if self._stopping is not None:
            return self._cancelled() or Verdict(
                "failed", FailureKind.PREEMPTED, Unavailable("the machine that this attempt ran on went away")
            )
        if said == "failed":
            error = from_wire(outcome.get("error") or {})
            return Verdict("failed", failure_of(error), error)
        if said == "stopped":
            return Verdict("failed", FailureKind.INTERNAL, InternalError("the trainer stopped unasked"))
        killed_for_memory = status == -signal.SIGKILL and _oom_kills() > self._oom_kills
        return verdict_on_exit(status, killed_for_memory=killed_for_memory, last_lines=self._last_lines)

    def _cancelled(self) -> Verdict | None:
        return Verdict("cancelled") if self._stopping == "cancel" else None

    # --- the last word ------------------------------------------------------------------------------------

    def _conclude(self, verdict: Verdict) -> None:
        """Last upload, last events, finish. Raises GoneError when the attempt is lost on the way."""
        self._environment_ready.set()  # from here on phases are ours
        for sink in self._sinks:
            sink.end()
        if self._uploader is not None:
            verdict = self._flush_uploads(self._uploader, verdict)
        if verdict.error is not None:
            self._log_failure(verdict.error)
        for sink in self._sinks:
            sink.close(self._settings.logger_wait_s)
        if self._untold is not None and verdict.outcome == "done":
            verdict = Verdict("failed", FailureKind.INFRASTRUCTURE, self._untold)
        self._pulse.advance(phase=Phase.FINISHED)
        while not self._sender.flush(0.25):
            self._check_still_ours()
        failpoint("supervisor.flushed")
        self._finish(verdict)
        failpoint("supervisor.finished")

    def _flush_uploads(self, uploader: Uploader, verdict: Verdict) -> Verdict:
        """Brings the last checkpoint home; `done` without a verified final one is no `done`."""
        if uploader.pending:
            self._set_phase({"phase": Phase.UPLOADING.value})
        preempted = self._stopping == "preempted"
        patience = self._settings.preempt_flush_s if preempted else self._settings.upload_patience_s
        flushed = uploader.flush(patience, until=self._gone.is_set)
        if verdict.outcome == "done" and uploader.final_step is None:
            return _unsaved(uploader.error)
        if not flushed and not self._gone.is_set():
            self._log("supervisor", f"the last checkpoint was not uploaded: {uploader.error or 'no time left'}")
        return verdict

    def _log_failure(self, error: FlashError) -> None:
        """The traceback goes to the log too: a status shows one line only."""
        source = "environment" if isinstance(error, UserCodeError) else "supervisor"
        self._log(source, f"{error}\n{error.detail}" if error.detail else str(error))

    def _finish(self, verdict: Verdict) -> None:
        error = self._redactor.value(verdict.error.to_wire()) if verdict.error else None
        finish = Finish(
            epoch=self._claim.epoch,
            outcome=verdict.outcome,  # type: ignore[arg-type]
            failure=verdict.failure,
            error=error,
        )
        try:
            persist(lambda: self._api.finish(finish), self._settings, patience_s=None, stop=self._gone)
        except (Conflict, Unauthorized) as fenced:
            raise GoneError(f"not ours any more: {fenced}", FENCED) from None
        except Unavailable as unreachable:
            raise GoneError(str(unreachable), UNREACHABLE) from None

    def _check_still_ours(self) -> None:
        if not self._lease.held:
            self._abandon("the lease ran out", UNREACHABLE)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Abandoned):
                raise message.gone

    # --- giving up, cleaning up -----------------------------------------------------------------------------

    def _fenced(self, error: FlashError) -> None:
        self._abandon(f"not ours any more: {error}", FENCED)

    def _abandon(self, reason: str, status: int) -> None:
        """From any thread: the children die now, before the lease does; then the main loop ends."""
        if not self._gone.is_set():
            self._gone.set()
            self._inbox.put(Abandoned(GoneError(reason, status)))
            self._kill_children()

    def _kill_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.kill()

    def _kill_children(self) -> list[psutil.Process]:
        self._kill_trainer()
        children = self._children()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        return children

    def _children(self) -> list[psutil.Process]:
        """Every living descendant, but not the sinks' own processes: those hold no device, and end by themselves."""
        spared: set[int] = set()
        for sink in self._sinks:
            with contextlib.suppress(psutil.Error):
                tree = psutil.Process(sink.pid).children(recursive=True)
                spared |= {sink.pid, *(process.pid for process in tree)}
        return [child for child in psutil.Process().children(recursive=True) if child.pid not in spared]

    def _end_processes(self) -> None:
        """Nothing that may hold the device outlives the supervisor: its end means that the device is free."""
        deadline = time.monotonic() + 5
        if self._host is not None:  # its own close also finds what hid from its group
            closing = threading.Thread(target=self._host.close, name="close host", daemon=True)
            closing.start()
            closing.join(1)  # it waits while a host is loading, which the kill below ends
        while (children := self._kill_children()) and time.monotonic() < deadline:
            psutil.wait_procs(children, timeout=0.5)
        if self._has_quarters:
            remove_quarters(self._start.attempt_id)


def _feed_line(intake: LogIntake, line: str) -> None:
    data = line.encode("utf-8", "replace")
    intake.feed(data if len(data) >= MAX_LINE_BYTES else data + b"\n")  # a longer line comes in pieces
    intake.tick()


def _defect(what: str, error: Exception) -> FlashError:
    if is_full_disk(error):
        return Unavailable(f"{what}: {error}", remedy="free space where FLASH_HOME is")
    return InternalError(f"{what}: {type(error).__name__}: {error}", detail=traceback.format_exc())


def _unsaved(error: FlashError | None) -> Verdict:
    """The trainer was done, its last checkpoint is not in the store."""
    if error is None:
        return Verdict("failed", FailureKind.INTERNAL, InternalError("the trainer left no final adapter"))
    lost = Unavailable(f"the final adapter could not be uploaded: {error.message}", remedy=error.remedy)
    return Verdict("failed", FailureKind.INFRASTRUCTURE, lost)


def _oom_kills() -> int:
    """How often the kernel has killed for memory in this container; 0 where it can't be told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status


def main(trainer: Sequence[str] | StandBy = TRAINER) -> NoReturn:
    environ = dict(os.environ)
    try:
        start = Start.parse(sys.stdin.buffer.readline(1 << 20))
        settings = WorkerSettings.from_environment(environ)
    except FlashError as error:
        sys.exit(_say(str(error), UNUSABLE))
    adopt_orphans()
    Path(start.work_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
    sinks = partial(sinks_for, environ=environ)
    supervisor = Supervisor(start, settings, environ, trainer=trainer, sinks=sinks)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.ask_to_stop("preempted"))
    signal.signal(signal.SIGINT, lambda *_: supervisor.ask_to_stop("preempted"))
    status = supervisor.run()
    sys.stderr.flush()
    os._exit(status)  # threads that wait for a network don't hold up the end


if __name__ == "__main__":
    main()
