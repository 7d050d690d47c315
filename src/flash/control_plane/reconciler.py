"""Makes what is so into what is wanted, for runs and engines: `decide` looks at a snapshot, `Reconciler` acts.

`decide` is pure: it reads no clock, no database and no process. It is level-triggered: it goes by how things
are, never by what happened last, so a restarted server just goes on. Every action is applied as a
compare-and-set; one that comes too late changes nothing, and the next look decides anew.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from flash.catalog.hardware import HardwareClass
from flash.control_plane.cleaning import Cleaner
from flash.control_plane.engines import (
    EngineAction,
    Engines,
    EngineSnapshot,
    NoteWait,
    StartEngine,
    shares,
    wait_reason,
    watch,
    yielding,
)
from flash.control_plane.estimating import NEEDS, reachable
from flash.control_plane.queueing import fair_order
from flash.control_plane.salvaging import salvage
from flash.control_plane.services import Services
from flash.control_plane.settings import ServerSettings
from flash.control_plane.status import FAILURE_WORDS, backoff_left
from flash.errors import FlashError
from flash.failpoints import failpoint
from flash.launching.launcher import LaunchRequest, LaunchUnsure, Probe
from flash.records import AttemptState, EngineState, FailureKind, Phase, RunState
from flash.storage import engines, identity, runs
from flash.storage import shares as org_shares
from flash.storage.shares import Standing

log = logging.getLogger("flash.reconciler")

_FIRST_LOOK_S = 0.05  # at a worker that is leaving
RETRIED = frozenset({FailureKind.INFRASTRUCTURE, FailureKind.STALL, FailureKind.PREEMPTED})


# --- what decide sees ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttemptSnapshot:
    """An attempt as seen now; durations in seconds on this server's monotonic clock."""

    epoch: int
    state: AttemptState
    device: str
    handle: str | None = None
    probe: Probe | None = None  # None: no handle to probe
    found: str | None = None  # the launcher's own handle for this attempt, if it lists one
    phase: Phase | None = None
    silent_s: float = 0.0  # since the last heartbeat
    stuck_s: float = 0.0  # since the last progress
    state_s: float = 0.0  # in this state
    stop_reason: str | None = None
    stop_s: float = 0.0  # since it was asked to stop
    outcome: str | None = None
    failure: FailureKind | None = None
    message: str | None = None
    error: dict[str, object] | None = None
    brought_checkpoint: bool = False

    @property
    def live(self) -> bool:
        return self.state is not AttemptState.ENDED


@dataclass(frozen=True)
class RunSnapshot:
    run_id: str
    state: RunState
    desired: str
    attempts: tuple[AttemptSnapshot, ...] = ()  # oldest first
    retry_at: float | None = None
    fruitless: int = 0
    micro_batch_divisor: int = 1
    active_s: float = 0.0
    wall_clock_limit_s: float | None = None
    org: str = ""
    priority: int = 0
    created_at: float = 0.0  # wall clock; with org and priority its place in the queue
    gpus: int = 0  # that it was planned for
    needs: Mapping[str, int] = field(default_factory=dict, hash=False)  # bytes by kind of device; empty: unknown


@dataclass(frozen=True)
class Orphan:
    """A worker that the launcher lists and the database does not expect: an attempt's or an engine's."""

    attempt_id: str
    handle: str
    seen_s: float


@dataclass(frozen=True)
class Snapshot:
    runs: tuple[RunSnapshot, ...]  # in order of submission
    devices: tuple[str, ...]  # none while the launcher is out of reach
    orphans: tuple[Orphan, ...] = ()
    engines: tuple[EngineSnapshot, ...] = ()  # live ones, oldest first
    listed: bool = True  # False: the launcher could not say what lives
    orgs: Mapping[str, Standing] = field(default_factory=dict, hash=False)  # those not named: of the usual weight
    hardware: Mapping[str, HardwareClass] = field(default_factory=dict, hash=False)  # what is known of devices

    @property
    def leaving(self) -> frozenset[str]:
        """Attempts and engines that are over, and hold their devices until their processes are gone."""
        attempts = ((f"{run.run_id}.{attempt.epoch}", attempt) for run in self.runs for attempt in run.attempts)
        over = {name for name, attempt in attempts if attempt.state is AttemptState.ENDING}
        return frozenset(over | {e.engine_id for e in self.engines if e.state is EngineState.ENDING})


# --- what decide says ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartAttempt:
    run_id: str
    epoch: int
    device: str


@dataclass(frozen=True)
class Launch:
    """Start the worker of an attempt that has none: it was just created, or the server died in between."""

    run_id: str
    epoch: int
    device: str


@dataclass(frozen=True)
class Adopt:
    run_id: str
    epoch: int
    handle: str


@dataclass(frozen=True)
class AskToStop:
    run_id: str
    epoch: int
    reason: str  # cancel | wall_clock


@dataclass(frozen=True)
class EndAttempt:
    """Fence the attempt off: from now on its writes are refused, and its worker is killed."""

    run_id: str
    epoch: int
    failure: FailureKind | None
    message: str


@dataclass(frozen=True)
class Kill:
    handle: str
    why: str


@dataclass(frozen=True)
class ConfirmDead:
    """The worker is known dead: its device is free."""

    run_id: str
    epoch: int
    failure: FailureKind | None = None  # for one that had not ended by itself
    message: str | None = None


@dataclass(frozen=True)
class Requeue:
    run_id: str
    reason: str
    delay_s: float
    fruitless: int
    micro_batch_divisor: int


@dataclass(frozen=True)
class Settle:
    run_id: str
    state: RunState
    reason: str
    error: dict[str, object] | None = field(default=None, hash=False)


Action = StartAttempt | Launch | Adopt | AskToStop | EndAttempt | Kill | ConfirmDead | Requeue | Settle | EngineAction


def decide(snapshot: Snapshot, now: float, settings: ServerSettings) -> list[Action]:
    """What to do now. `now` is wall-clock time, used for nothing but the back-off's due time."""
    actions: list[Action] = []
    for run in snapshot.runs:
        for attempt in run.attempts:
            if attempt.live:
                actions += _watch(run, attempt, settings, listed=snapshot.listed)
        settled = _judge(run, settings)
        if settled is not None:
            actions.append(settled)
    for engine in snapshot.engines:
        actions += watch(engine, settings, listed=snapshot.listed)
    judged = {action.run_id for action in actions if isinstance(action, Settle)}
    actions += _place(snapshot, judged, now, settings)
    actions += [
        Kill(orphan.handle, f"no one owns {orphan.attempt_id}")
        for orphan in snapshot.orphans
        if orphan.seen_s >= settings.orphan_grace_s
    ]
    return actions


def _watch(
    run: RunSnapshot, attempt: AttemptSnapshot, settings: ServerSettings, *, listed: bool
) -> list[Action]:
    """One live attempt: is its worker there, heard of, moving, and still wanted?"""
    if attempt.handle is None and listed:  # else it may live without our knowing: leave it to its time limits
        if attempt.found is not None:
            return [Adopt(run.run_id, attempt.epoch, attempt.found)]
        if attempt.state is AttemptState.LAUNCHING and run.desired == "run" and not run.state.terminal:
            return [_overdue(run, attempt, settings) or Launch(run.run_id, attempt.epoch, attempt.device)]
        if attempt.state is not AttemptState.RUNNING:
            return [ConfirmDead(run.run_id, attempt.epoch)]
    elif attempt.probe is Probe.DEAD:
        if attempt.state is AttemptState.ENDING:
            return [ConfirmDead(run.run_id, attempt.epoch)]
        early = attempt.state is AttemptState.LAUNCHING
        message = "the worker's process ended before it reported" if early else "the worker's process died"
        return [ConfirmDead(run.run_id, attempt.epoch, FailureKind.INFRASTRUCTURE, message)]
    if attempt.state is AttemptState.ENDING:
        return _see_off(attempt, settings)
    overdue = _overdue(run, attempt, settings)
    if overdue is not None:
        return [overdue]
    reason = _stop_reason(run)
    if reason is not None and attempt.stop_reason is None:
        if attempt.state is AttemptState.LAUNCHING:
            cancelled = reason == "cancel"
            message = f"{'cancelled' if cancelled else 'out of time'} before it started"
            return [
                EndAttempt(run.run_id, attempt.epoch, None if cancelled else FailureKind.WALL_CLOCK, message)
            ]
        return [AskToStop(run.run_id, attempt.epoch, reason)]
    return []


def _see_off(attempt: AttemptSnapshot, settings: ServerSettings) -> list[Action]:
    """A worker that had its last word may leave by itself for a while; any other is killed at once."""
    patience = settings.exit_grace_s if attempt.outcome is not None else 0.0
    if attempt.handle is None or attempt.state_s < patience:
        return []
    return [Kill(attempt.handle, attempt.message or "the attempt is over")]


def _overdue(run: RunSnapshot, attempt: AttemptSnapshot, settings: ServerSettings) -> EndAttempt | None:
    def end(failure: FailureKind | None, message: str) -> EndAttempt:
        return EndAttempt(run.run_id, attempt.epoch, failure, message)

    if attempt.state is AttemptState.LAUNCHING:
        if attempt.state_s >= settings.claim_timeout_s:
            message = f"the worker did not report within {settings.claim_timeout_s:g} s"
            return end(FailureKind.INFRASTRUCTURE, message)
        return None
    if attempt.silent_s >= settings.lease_s:
        return end(FailureKind.INFRASTRUCTURE, f"no sign of the worker for {settings.lease_s:g} s")
    if attempt.stop_reason == "cancel" and attempt.stop_s >= settings.cancel_grace_s:
        return end(None, f"the worker did not stop within {settings.cancel_grace_s:g} s of the cancel")
    if attempt.stop_reason == "wall_clock" and attempt.stop_s >= settings.flush_grace_s:
        return end(FailureKind.WALL_CLOCK, f"the worker did not stop within {settings.flush_grace_s:g} s of its limit")
    limit = settings.stall_limit(attempt.phase)
    if attempt.stuck_s >= limit:
        phase = (attempt.phase or Phase.STARTING).value
        return end(FailureKind.STALL, f"no progress for {limit:g} s while {phase}")
    return None


def _stop_reason(run: RunSnapshot) -> str | None:
    if run.desired == "cancel":
        return "cancel"
    if run.wall_clock_limit_s is not None and run.active_s >= run.wall_clock_limit_s:
        return "wall_clock"
    return None


def _judge(run: RunSnapshot, settings: ServerSettings) -> Action | None:
    """Where the run goes from here: to its end, to another attempt, or nowhere yet."""
    if run.state.terminal:
        return None
    last = run.attempts[-1] if run.attempts else None
    if last is not None and last.outcome == "done":
        return Settle(run.run_id, RunState.DONE, "the final adapter is complete and verified")
    if any(attempt.live for attempt in run.attempts):
        return None
    if run.desired == "cancel":
        return Settle(run.run_id, RunState.CANCELLED, "cancelled")
    if run.state is RunState.QUEUED:
        return None
    if last is None:
        return Requeue(run.run_id, "it had no attempt", 0.0, run.fruitless, run.micro_batch_divisor)
    return _after_failure(run, last, settings)


def _after_failure(run: RunSnapshot, last: AttemptSnapshot, settings: ServerSettings) -> Action:
    failure = last.failure or FailureKind.INFRASTRUCTURE
    words = last.message or FAILURE_WORDS[failure]
    if failure is FailureKind.OUT_OF_MEMORY and run.micro_batch_divisor == 1:
        reason = f"{words}; trying once more with a smaller micro-batch"
        return Requeue(run.run_id, reason, settings.backoff_first_s, run.fruitless, 2)
    if failure not in RETRIED:
        return Settle(run.run_id, RunState.FAILED, words, _error(failure, words, last.error))
    fruitless = 0 if last.brought_checkpoint else run.fruitless + 1
    if fruitless >= settings.fruitless_limit:
        message = f"{fruitless} attempts in a row brought no new checkpoint; the last: {words}"
        return Settle(run.run_id, RunState.FAILED, message, _error(failure, message, last.error))
    delay = min(settings.backoff_first_s * 2 ** max(0, fruitless - 1), settings.backoff_max_s)
    return Requeue(run.run_id, words, delay, fruitless, run.micro_batch_divisor)


def _error(failure: FailureKind, message: str, reported: dict[str, object] | None) -> dict[str, object]:
    """The run's error: the worker's own account where it gave one."""
    own: dict[str, object] = {"code": failure.value, "message": message, "remedy": None, "detail": None}
    if not reported:
        return own
    told = {key: value for key, value in reported.items() if key in own and value is not None}
    if failure in RETRIED:  # the count of attempts says more than the last one's words
        told.pop("message", None)
    return {**own, **told}


def _place(snapshot: Snapshot, judged: set[str], now: float, settings: ServerSettings) -> list[Action]:
    """Gives free devices to what waits, runs and engines alike, in their order; a run in back-off holds no one up.

    Where nothing is free, idle engines are asked to leave.

    A run that fits none of the free devices lets those behind it start, and keeps its place: it gets the next device
    that it fits, at its turn. Where its org has none of these and a younger run of another org has got one, the runs
    behind it of its own org wait with it: whatever they start on counts as their org's share, so that its turn, and
    this run, might never come. What fits no device that there is stays queued until one comes.
    """
    needs = {run.run_id: run.needs for run in snapshot.runs} | {each.engine_id: each.needs for each in snapshot.engines}

    def fits(name: str, device: str) -> bool:
        return _fits(needs[name], device, snapshot.hardware)

    runs_on = {attempt.device: run for run in snapshot.runs for attempt in run.attempts if attempt.live}
    engines_on = {engine.device: engine for engine in snapshot.engines if engine.device is not None}
    waiting: dict[str, bool] = {}  # what found no device, and whether it is an engine
    held_back: set[str] = set()  # orgs that start nothing more now
    actions: list[Action] = []
    for item in _queue(snapshot, judged, runs_on, engines_on, now, settings):
        if isinstance(item, RunSnapshot):
            device = _best(item, _free(snapshot.devices, runs_on, engines_on, settings), snapshot.hardware)
            if device is None:
                waiting[item.run_id] = False
                if _overtaken(item, runs_on, snapshot.hardware):
                    held_back.add(item.org)
                continue
            if item.org in held_back:
                continue
            runs_on[device] = item
            actions.append(StartAttempt(item.run_id, item.attempts[-1].epoch + 1 if item.attempts else 1, device))
        else:
            free = _free(snapshot.devices, engines_on, runs_on, settings)
            device = next((name for name in free if fits(item.engine_id, name)), None)
            if device is None:
                waiting[item.engine_id] = True
                continue
            engines_on[device] = item
            actions.append(StartEngine(item.engine_id, device))
    for engine in snapshot.engines:
        if waiting.get(engine.engine_id):
            usable = [device for device in snapshot.devices if fits(engine.engine_id, device)]
            reason = wait_reason(usable, runs_on, engines_on)
            if engine.reason != reason:
                actions.append(NoteWait(engine.engine_id, reason))
    return [*actions, *yielding(snapshot.engines, waiting, settings, fits)]


def _free(
    devices: tuple[str, ...], own_kind: Container[str], other_kind: Container[str], settings: ServerSettings
) -> list[str]:
    """The devices that hold none of the same kind, and none of the other that they can't be shared with."""
    return [name for name in devices if name not in own_kind and (shares(name, settings) or name not in other_kind)]


def _best(run: RunSnapshot, free: Sequence[str], hardware: Mapping[str, HardwareClass]) -> str | None:
    """The smallest of the free devices that the run fits, of GPUs first if it was planned for one.

    Larger ones are left to runs that fit no other. Where nobody knows what it needs, or has, it is the first.
    """

    def rank(device: str) -> tuple[bool, int]:
        known = hardware.get(device) if run.needs else None
        return run.gpus > 0 and device.startswith("cpu"), known.memory if known else 0

    return min((device for device in free if _fits(run.needs, device, hardware)), key=rank, default=None)


def _fits(needs: Mapping[str, int], device: str, hardware: Mapping[str, HardwareClass]) -> bool:
    """False only where it is known."""
    known = hardware.get(device)
    return known is None or needs.get(known.kind, 0) <= known.memory


def _overtaken(run: RunSnapshot, runs_on: Mapping[str, RunSnapshot], hardware: Mapping[str, HardwareClass]) -> bool:
    """Whether of the devices that this run fits its org has none, and another org's younger run has one."""
    on_these = [other for device, other in runs_on.items() if _fits(run.needs, device, hardware)]
    return any(other.created_at > run.created_at for other in on_these) and run.org not in {o.org for o in on_these}


def _queue(
    snapshot: Snapshot,
    judged: set[str],
    runs_on: Mapping[str, RunSnapshot],
    engines_on: Container[str],
    now: float,
    settings: ServerSettings,
) -> list[RunSnapshot | EngineSnapshot]:
    """What could be started at once if there was a device for it, in order: runs by their orgs' fair shares, and
    each engine before the first run that is younger."""
    ready = [
        run
        for run in snapshot.runs
        if run.state is RunState.QUEUED
        and run.desired == "run"
        and run.run_id not in judged
        and not any(attempt.live for attempt in run.attempts)
        and backoff_left(run.retry_at, now, settings) <= 0
    ]
    held = Counter(run.org for run in runs_on.values())
    usable = [name for name in snapshot.devices if shares(name, settings) or name not in engines_on]
    wanted = [
        engine
        for engine in snapshot.engines
        if engine.state is EngineState.WAITING and engine.unwanted_s < settings.engine_want_s
    ]
    hosts = deque(sorted(wanted, key=lambda engine: engine.created_at))
    order: list[RunSnapshot | EngineSnapshot] = []
    for run in fair_order(ready, held, snapshot.orgs, len(usable)):
        while hosts and hosts[0].created_at < run.created_at:
            order.append(hosts.popleft())
        order.append(run)
    return [*order, *hosts]


def last_beat(attempt: runs.AttemptRow) -> float | None:
    """By the database's clock; it is only ever compared with itself."""
    return attempt.heartbeat_at or attempt.claimed_at


def progress_of(attempt: runs.AttemptRow) -> tuple[int, int, Phase | None]:
    """What differs when an attempt has moved forward."""
    return attempt.progress, attempt.step, attempt.phase


# --- acting -------------------------------------------------------------------------------------------


class Reconciler:
    """Looks and acts, on `tick` or from its own thread; woken by routes, else at intervals."""

    def __init__(self, plane: Services) -> None:
        self._plane = plane
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._cleaner = Cleaner(plane)
        self._engines = Engines(plane)
        self._trouble: str | None = None  # with the launcher, as last told
        self._unsure: dict[str, str] = {}  # tokens of attempts of which it is not known whether they were launched
        self._leaving: frozenset[str] = frozenset()  # attempts and engines that are ending, as last seen

    def start(self) -> None:
        self._plane.lead.start(on_change=self._plane.wake.set)
        self._thread = threading.Thread(target=self._loop, name="reconciler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._plane.wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._plane.lead.close()

    def _loop(self) -> None:
        led, leaving = 0, self._leaving
        longest = pause = self._plane.settings.reconcile_interval_s
        while not self._stopped.is_set():
            woken = self._plane.wake.wait(pause)
            self._plane.wake.clear()
            if self._stopped.is_set():
                return
            term = self._plane.lead.term
            if not term:
                pause = longest
                continue
            if term != led:  # nobody may have listened to the workers for a while: everything gets its full time
                self._plane.stopwatches.keep_only(set())
                led = term
            try:
                # Actions make new facts (an attempt just created, a worker just dead): look again at once.
                for _ in range(8):
                    if not self.tick() or self._plane.lead.term != led:
                        break
                self._cleaner.clean()
            except DBAPIError as error:
                log.warning("the database can't be used, trying again: %s", " ".join(str(error.orig).split())[:300])
            except Exception:
                log.exception("reconciling failed; trying again")
            # A worker is gone moments after its last word, and others may wait for its device: soon, then ever later.
            if self._leaving != leaving:
                pause = _FIRST_LOOK_S
            elif not woken:
                pause *= 2
            leaving = self._leaving
            pause = min(pause, longest) if leaving else longest

    def tick(self) -> list[Action]:
        """One look and what came of it. Kills alone are no change: they take effect when a probe says so."""
        snapshot = self.look()
        self._leaving = snapshot.leaving
        actions = decide(snapshot, self._plane.clock(), self._plane.settings)
        changed = []
        for action in actions:
            try:
                if self.apply(action):
                    changed.append(action)
            except FlashError as error:
                log.warning("%s: %s", action, error)
            except Exception:  # one run's trouble must not keep the others waiting
                log.exception("%s failed", action)
        return changed

    def look(self) -> Snapshot:
        plane = self._plane
        listed, devices = self._ask_launcher()
        with plane.database.read() as connection:
            open_runs = runs.open_runs(connection)
            live_engines = engines.live(connection)
            attempts = runs.attempts_of(connection, [run.id for run in open_runs])
            orgs = org_shares.standings(connection)
            brought = runs.epochs_with_checkpoints(connection, [run.id for run in open_runs if attempts[run.id]])
        seen = []
        expected: set[str] = set()
        for run in open_runs:
            views = tuple(
                self._see(attempt, listed or {}, (run.id, attempt.epoch) in brought) for attempt in attempts[run.id]
            )
            expected |= {attempt.id for attempt in attempts[run.id] if attempt.state is not AttemptState.ENDED}
            seen.append(
                RunSnapshot(
                    run_id=run.id,
                    state=run.state,
                    desired=run.desired,
                    attempts=views,
                    retry_at=run.retry_at,
                    fruitless=run.fruitless,
                    micro_batch_divisor=run.micro_batch_divisor,
                    active_s=run.active_s,
                    wall_clock_limit_s=run.wall_clock_limit_s,
                    org=run.org_id,
                    priority=run.priority,
                    created_at=run.created_at,
                    gpus=run.gpus,
                    needs=(run.estimate or {}).get(NEEDS, {}),
                )
            )
        hosts = tuple(
            self._engines.see(row, self._probe(row.handle) if row.handle else None, listed or {})
            for row in live_engines
        )
        expected |= {row.id for row in live_engines}
        orphans = tuple(
            Orphan(attempt_id, handle, plane.stopwatches.elapsed(attempt_id, "orphan"))
            for attempt_id, handle in (listed or {}).items()
            if attempt_id not in expected
        )
        plane.stopwatches.keep_only({*expected, *(orphan.attempt_id for orphan in orphans)})
        self._unsure = {worker: token for worker, token in self._unsure.items() if worker in expected}
        hardware = dict(reachable(plane)) if devices else {}
        return Snapshot(
            tuple(seen), devices, orphans, hosts, listed=listed is not None, orgs=orgs, hardware=hardware
        )

    def _ask_launcher(self) -> tuple[dict[str, str] | None, tuple[str, ...]]:
        """What lives by its id (None: it can't be told), and the devices; trouble there must not stop a look."""
        try:
            found = self._plane.launcher.list(), tuple(self._plane.launcher.devices())
        except Exception as error:
            if str(error) != self._trouble:  # it may last for hours, and looks are many
                log.warning("the launcher can't be asked: %s", error)
            self._trouble = str(error)
            return None, ()
        if self._trouble is not None:
            log.warning("the launcher answers again")
            self._trouble = None
        return found

    def _probe(self, handle: str) -> Probe:
        try:
            return self._plane.launcher.probe(handle)
        except Exception as error:
            log.warning("%s can't be probed: %s", handle, error)
            return Probe.UNKNOWN

    def _see(self, attempt: runs.AttemptRow, listed: dict[str, str], brought: bool) -> AttemptSnapshot:
        watch = self._plane.stopwatches
        live = attempt.state is not AttemptState.ENDED
        probe = self._probe(attempt.handle) if live and attempt.handle else None
        running = attempt.state is AttemptState.RUNNING
        return AttemptSnapshot(
            epoch=attempt.epoch,
            state=attempt.state,
            device=attempt.device,
            handle=attempt.handle,
            probe=probe,
            found=listed.get(attempt.id),
            phase=attempt.phase,
            silent_s=watch.unchanged(last_beat(attempt), attempt.id, "beat") if running else 0.0,
            stuck_s=watch.unchanged(progress_of(attempt), attempt.id, "progress") if running else 0.0,
            state_s=watch.elapsed(attempt.id, "state", attempt.state) if live else 0.0,
            stop_reason=attempt.stop_reason,
            stop_s=watch.elapsed(attempt.id, "stop") if live and attempt.stop_reason else 0.0,
            outcome=attempt.outcome,
            failure=attempt.failure,
            message=attempt.message,
            error=attempt.error,
            brought_checkpoint=brought,
        )

    def apply(self, action: Action) -> bool:
        """Carries out one action; False if nothing changed."""
        if isinstance(action, EngineAction):
            return self._engines.apply(action)
        if isinstance(action, StartAttempt):
            return self._start_attempt(action)
        if isinstance(action, Launch):
            return self._launch(action)
        if isinstance(action, Kill):
            log.info("killing %s: %s", action.handle, action.why)
            self._plane.launcher.kill(action.handle)
            return False
        now = self._plane.clock()
        if isinstance(action, ConfirmDead):
            salvage(self._plane, action.run_id, action.epoch)
            failpoint("server.salvaged")
        with self._plane.database.write() as connection:
            if isinstance(action, Adopt):
                runs.record_handle(connection, action.run_id, action.epoch, action.handle)
                return True
            if isinstance(action, AskToStop):
                running = [AttemptState.RUNNING]
                return runs.change_attempt(
                    connection, action.run_id, action.epoch, source=running, now=now, stop_reason=action.reason
                )
            if isinstance(action, EndAttempt):
                return runs.change_attempt(
                    connection,
                    action.run_id,
                    action.epoch,
                    source=[AttemptState.LAUNCHING, AttemptState.RUNNING],
                    target=AttemptState.ENDING,
                    now=now,
                    failure=action.failure.value if action.failure else None,
                    message=action.message,
                )
            if isinstance(action, ConfirmDead):
                return self._confirm_dead(connection, action, now)
            if isinstance(action, Requeue):
                return runs.transition(
                    connection,
                    action.run_id,
                    source=[RunState.PROVISIONING, RunState.RUNNING],
                    target=RunState.QUEUED,
                    reason=action.reason,
                    now=now,
                    retry_at=now + action.delay_s,
                    fruitless=action.fruitless,
                    micro_batch_divisor=action.micro_batch_divisor,
                )
            return runs.transition(
                connection,
                action.run_id,
                source=[RunState.QUEUED, RunState.PROVISIONING, RunState.RUNNING],
                target=action.state,
                reason=action.reason,
                now=now,
                error=action.error,
            )

    def _confirm_dead(self, connection: Connection, action: ConfirmDead, now: float) -> bool:
        values: dict[str, Any] = {}
        if action.failure is not None:
            values = {"failure": action.failure.value, "message": action.message}
        live = [AttemptState.LAUNCHING, AttemptState.RUNNING, AttemptState.ENDING]
        if action.failure is not None:
            live.remove(AttemptState.ENDING)  # it had its last word since: that one counts
        return runs.change_attempt(
            connection,
            action.run_id,
            action.epoch,
            source=live,
            target=AttemptState.ENDED,
            now=now,
            **values,
        )

    def _start_attempt(self, action: StartAttempt) -> bool:
        work_dir = self._plane.settings.home / "work" / action.run_id / str(action.epoch)
        with self._plane.database.write() as connection:
            created = runs.insert_attempt(
                connection,
                action.run_id,
                action.epoch,
                device=action.device,
                work_dir=str(work_dir),
                now=self._plane.clock(),
            )
            if created:
                org_shares.take_turn(connection, action.run_id)
        failpoint("server.attempt")
        return created and self._launch(Launch(action.run_id, action.epoch, action.device))

    def _launch(self, action: Launch) -> bool:
        """Gives the attempt a fresh token and starts its worker; a launch that fails ends the attempt.

        Where that can't be told, the next look does: it finds the worker, or launches again, with the same token,
        since the first launch may be carried out yet. `claim_timeout_s` bounds it.
        """
        plane = self._plane
        worker = runs.attempt_id(action.run_id, action.epoch)
        token = self._unsure.pop(worker, None) or identity.new_token(identity.ATTEMPT_PREFIX)
        sha256 = identity.fingerprint(token)
        with plane.database.write() as connection:
            if not runs.issue_token(connection, action.run_id, action.epoch, token_sha256=sha256):
                return False
            attempt = runs.get_attempt(connection, action.run_id, action.epoch)
        request = LaunchRequest(
            attempt_id=attempt.id,
            api_url=plane.api_url,
            token=token,
            work_dir=attempt.work_dir,
            device=attempt.device,
        )
        try:
            handle = plane.launcher.launch(request)
            failpoint("server.launched")
        except LaunchUnsure as error:
            log.warning("%s may have been launched or not: %s", worker, error)
            self._unsure[worker] = token
            return False
        except (FlashError, OSError) as error:
            failure = FailureKind.INFRASTRUCTURE
            return self.apply(ConfirmDead(action.run_id, action.epoch, failure, f"launching failed: {error}"))
        with plane.database.write() as connection:
            runs.record_handle(connection, action.run_id, action.epoch, handle)
        return True
