"""Engines' lives: started on demand, watched, asked to leave when idle, seen off.

`watch` and `yielding` are pure, like the rest of `reconciler.decide`, which calls them and gives out devices to
runs and engines from one queue; `Engines` looks and acts for them. An engine is wanted by a row in the state
`waiting` (`storage.engines.want`); nothing here knows adapters, names or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash.catalog.catalog import load_catalog
from flash.client.engines import find_engine
from flash.control_plane.estimating import serving_needs
from flash.control_plane.services import Services
from flash.control_plane.settings import ServerSettings
from flash.errors import FlashError, InternalError, Unavailable
from flash.launching.launcher import LaunchRequest, Probe
from flash.records import EngineState
from flash.serving.hello import EngineAnswer, EngineHeartbeat, EngineHello
from flash.storage import engines, identity

log = logging.getLogger("flash.engines")

IDLE = "idle_s"  # the statistic that says since when a host has had no request
TOKEN = "token"  # the name under which the vault seals an engine's token
STARTED = (EngineState.LAUNCHING, EngineState.LOADING, EngineState.READY)
_LOG_TAIL = 2000  # characters of a dead host's log that its error keeps


# --- what decide sees ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineSnapshot:
    """An engine as seen now; durations in seconds on this server's monotonic clock."""

    engine_id: str
    model: str
    state: EngineState
    created_at: float = 0.0  # wall clock; its place in the queue
    device: str | None = None
    handle: str | None = None
    probe: Probe | None = None  # None: no handle to probe
    found: str | None = None  # the launcher's own handle for this engine, if it lists one
    silent_s: float = 0.0  # since the last heartbeat
    state_s: float = 0.0  # in this state
    unused_s: float = 0.0  # since its last request ended; 0 while one is open
    unwanted_s: float = 0.0  # since someone last waited for it
    reason: str | None = None
    needs: Mapping[str, int] = field(default_factory=dict, hash=False)  # while it waits: bytes by kind of device


# --- what decide says ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartEngine:
    """Give a waiting engine this device."""

    engine_id: str
    device: str


@dataclass(frozen=True)
class LaunchEngine:
    """Start the host of an engine that has none: it just got its device, or the server died in between."""

    engine_id: str


@dataclass(frozen=True)
class NoteWait:
    engine_id: str
    reason: str


@dataclass(frozen=True)
class AdoptEngine:
    engine_id: str
    handle: str


@dataclass(frozen=True)
class DrainEngine:
    engine_id: str
    reason: str


@dataclass(frozen=True)
class EndEngine:
    """Fence the host off: from now on it is not asked, its heartbeats are refused, and it is killed."""

    engine_id: str
    message: str


@dataclass(frozen=True)
class KillEngine:
    handle: str
    why: str


@dataclass(frozen=True)
class BuryEngine:
    """The host is known dead: its device is free. `message`: it should not have died."""

    engine_id: str
    message: str | None = None


EngineAction = (
    StartEngine | LaunchEngine | NoteWait | AdoptEngine | DrainEngine | EndEngine | KillEngine | BuryEngine
)


def watch(engine: EngineSnapshot, settings: ServerSettings, *, listed: bool) -> list[EngineAction]:
    """One live engine: is its host there, heard of, in time, and still of use?"""
    if engine.state is EngineState.WAITING:
        gone = engine.unwanted_s >= settings.engine_want_s
        return [BuryEngine(engine.engine_id)] if gone else []
    if engine.handle is None and listed:  # else it may live without our knowing: leave it to its time limits
        if engine.found is not None:
            return [AdoptEngine(engine.engine_id, engine.found)]
        if engine.state is EngineState.LAUNCHING:
            return [LaunchEngine(engine.engine_id)]
        if engine.state in (EngineState.DRAINING, EngineState.ENDING):
            return [BuryEngine(engine.engine_id)]
    elif engine.probe is Probe.DEAD:
        return [BuryEngine(engine.engine_id, _death(engine))]
    if engine.state is EngineState.ENDING:
        return [KillEngine(engine.handle, engine.reason or "its engine is over")] if engine.handle else []
    overdue = _overdue(engine, settings)
    if overdue is not None:
        return [EndEngine(engine.engine_id, overdue)]
    if engine.state is EngineState.READY and 0 < settings.engine_idle_s <= engine.unused_s:
        return [DrainEngine(engine.engine_id, f"no request for {settings.engine_idle_s:g} s")]
    return []


def _death(engine: EngineSnapshot) -> str | None:
    if engine.state in (EngineState.LAUNCHING, EngineState.LOADING):
        return "the engine's process ended before it was ready"
    return "the engine's process died" if engine.state is EngineState.READY else None


def _overdue(engine: EngineSnapshot, settings: ServerSettings) -> str | None:
    if engine.state is EngineState.LAUNCHING:
        late = engine.state_s >= settings.claim_timeout_s
        return f"the engine did not report within {settings.claim_timeout_s:g} s" if late else None
    if engine.silent_s >= settings.lease_s:
        return f"no sign of the engine for {settings.lease_s:g} s"
    if engine.state is EngineState.LOADING and engine.state_s >= settings.engine_load_s:
        return f"the model was not loaded within {settings.engine_load_s:g} s"
    if engine.state is EngineState.DRAINING and engine.state_s >= settings.engine_drain_s:
        return f"the engine did not leave within {settings.engine_drain_s:g} s"
    return None


def shares(device: str, settings: ServerSettings) -> bool:
    """Whether a run and an engine may be on this device together; a GPU's memory belongs to one of them, and a place on
    a cluster to one job."""
    return settings.share_cpu and settings.launcher == "local" and device.partition(":")[0] == "cpu"


def yielding(
    engines_: Iterable[EngineSnapshot],
    waiting: Mapping[str, bool],
    settings: ServerSettings,
    fits: Callable[[str, str], bool],
) -> list[DrainEngine]:
    """Idle engines that leave their devices to what waits.

    `waiting` has what found no device, in the queue's order: its id, and whether it is an engine (which any
    engine is in the way of, while a run is in the way of engines only on devices that they can't share). `fits(id,
    device)`: whether it would have room there.
    """
    live = [engine for engine in engines_ if engine.device is not None]
    leaving = [engine for engine in live if engine.state in (EngineState.DRAINING, EngineState.ENDING)]
    idle = [e for e in live if e.state is EngineState.READY and e.unused_s >= settings.engine_yield_s]
    idle.sort(key=lambda engine: -engine.unused_s)
    asked: list[DrainEngine] = []
    for name, is_engine in waiting.items():
        for pool in (leaving, idle):
            usable = [e for e in pool if e.device is not None and (is_engine or not shares(e.device, settings))]
            fitting = [e for e in usable if fits(name, e.device or "")]
            if fitting:
                pool.remove(fitting[0])
                if pool is idle:
                    to = "another engine" if is_engine else "a run"
                    asked.append(DrainEngine(fitting[0].engine_id, f"it yields {fitting[0].device} to {to}"))
                break
    return asked


def wait_reason(devices: Iterable[str], runs: Container[str], held: Mapping[str, EngineSnapshot]) -> str:
    """Why an engine has no device, for people. `runs`: the devices that have one; `held`: the engine on each."""
    parts = []
    for device in devices:
        if device in held:
            leaving = held[device].state in (EngineState.DRAINING, EngineState.ENDING)
            parts.append(f"{device} {'is being left by' if leaving else 'serves'} {held[device].model}")
        elif device in runs:
            parts.append(f"{device} trains a run")  # whose, is not for everybody who reads this
    return f"waiting for a free device: {', '.join(parts)}" if parts else "waiting: the server has no device"


# --- acting -------------------------------------------------------------------------------------------


class Engines:
    """The reconciler's eyes and hands for engines."""

    def __init__(self, plane: Services) -> None:
        self._plane = plane

    def see(self, row: engines.EngineRow, probe: Probe | None, listed: Mapping[str, str]) -> EngineSnapshot:
        watch_ = self._plane.stopwatches
        reporting = row.state in (EngineState.LOADING, EngineState.READY, EngineState.DRAINING)
        silent_s = watch_.unchanged(row.heartbeat_at, row.id, "beat") if row.heartbeat_at else 0.0
        # Requests may have come through another server: the host's own count is as old as its last heartbeat.
        busy = row.in_flight > 0 or self._plane.traffic.open_on(row.id) > 0
        if busy:
            watch_.restart(row.id, "used")
        return EngineSnapshot(
            engine_id=row.id,
            model=row.model,
            state=row.state,
            created_at=row.created_at,
            device=row.device,
            handle=row.handle,
            probe=probe,
            found=listed.get(row.id),
            silent_s=silent_s if reporting else 0.0,
            state_s=watch_.elapsed(row.id, "state", row.state),
            unused_s=0.0 if busy else min(watch_.elapsed(row.id, "used"), (row.stats.get(IDLE) or 0.0) + silent_s),
            unwanted_s=silent_s if row.state is EngineState.WAITING else 0.0,
            reason=row.reason,
            needs=self._needs(row.model) if row.state is EngineState.WAITING else {},
        )

    def _needs(self, model: str) -> Mapping[str, int]:
        try:
            return serving_needs(load_catalog(self._plane.settings.home).get(model))
        except FlashError:  # its launch will say so
            return {}

    def apply(self, action: EngineAction) -> bool:
        """Carries out one action; False if nothing changed."""
        if isinstance(action, StartEngine):
            log.info("%s gets %s", action.engine_id, action.device)
            waiting = (EngineState.WAITING,)
            target = EngineState.LAUNCHING
            started = self._change(action.engine_id, waiting, target, device=action.device, reason=None)
            return started and self._launch(action.engine_id)
        if isinstance(action, LaunchEngine):
            return self._launch(action.engine_id)
        if isinstance(action, KillEngine):
            log.info("killing %s: %s", action.handle, action.why)
            self._plane.launcher.kill(action.handle)
            return False
        if isinstance(action, NoteWait):
            return self._change(action.engine_id, (EngineState.WAITING,), None, reason=action.reason) and False
        if isinstance(action, AdoptEngine):
            return self._change(action.engine_id, engines.LIVE, None, handle=action.handle)
        if isinstance(action, DrainEngine):
            log.info("%s leaves: %s", action.engine_id, action.reason)
            return self._change(action.engine_id, (EngineState.READY,), EngineState.DRAINING, reason=action.reason)
        if isinstance(action, EndEngine):
            log.warning("%s is given up: %s", action.engine_id, action.message)
            error = Unavailable(action.message).to_wire()
            sources = (*STARTED, EngineState.DRAINING)
            return self._change(action.engine_id, sources, EngineState.ENDING, reason=action.message, error=error)
        return self._bury(action)

    def _bury(self, action: BuryEngine) -> bool:
        values: dict[str, Any] = {}
        if action.message is not None:
            with self._plane.database.read() as connection:
                work_dir = engines.get(connection, action.engine_id).work_dir
            error = Unavailable(action.message, detail=_last_words(Path(work_dir)))
            log.warning("%s: %s", action.engine_id, action.message)
            values = {"reason": action.message, "error": error.to_wire()}
        sources = STARTED if action.message is not None else engines.LIVE
        return self._change(action.engine_id, sources, EngineState.ENDED, **values)

    def _change(
        self, engine_id: str, source: tuple[EngineState, ...], target: EngineState | None, **values: Any
    ) -> bool:
        with self._plane.database.write() as connection:
            return engines.change(
                connection, engine_id, source=source, target=target, now=self._plane.clock(), **values
            )

    def _launch(self, engine_id: str) -> bool:
        """Gives the engine a fresh token and starts its host; a launch that fails ends the engine."""
        plane = self._plane
        token = identity.new_token(identity.ATTEMPT_PREFIX)
        sealed = plane.vault.seal(engine_id, TOKEN, token)
        with plane.database.write() as connection:
            sha256 = identity.fingerprint(token)
            if not engines.issue_token(connection, engine_id, sha256=sha256, sealed=sealed):
                return False
            row = engines.get(connection, engine_id)
        try:
            request = LaunchRequest(
                attempt_id=row.id,
                api_url=plane.api_url,
                token=token,
                work_dir=row.work_dir,
                device=row.device or "",
                engine=hello(plane, row, token).model_dump(mode="json"),
            )
            handle = plane.launcher.launch(request)
        except (FlashError, OSError) as error:
            failure = error if isinstance(error, FlashError) else InternalError(str(error))
            log.warning("%s can't be launched: %s", row.id, failure)
            launching = (EngineState.LAUNCHING,)
            reason, wire = f"launching failed: {failure}", failure.to_wire()
            return self._change(row.id, launching, EngineState.ENDED, reason=reason, error=wire)
        return self._change(row.id, engines.LIVE, None, handle=handle)


def hello(plane: Services, row: engines.EngineRow, token: str) -> EngineHello:
    """What the engine's host is told. ModelError: the catalog does not have the base any more."""
    entry = load_catalog(plane.settings.home).get(row.model)
    settings = plane.settings
    return EngineHello(
        engine_id=row.id,
        plane_url=plane.api_url,
        token=token,
        model=entry.id,
        source=entry.source,
        revision=entry.revision,
        device=row.device or "",
        work_dir=row.work_dir,
        store_url=plane.store.url,
        store_options={} if plane.signs_for_workers else plane.store.options,
        signed=plane.signs_for_workers,
        cache_dir=str(settings.home / "cache"),
        heartbeat_s=settings.heartbeat_s,
        lease_s=settings.lease_s,
        idle_s=settings.engine_idle_s,
        max_rows=settings.engine_rows,
        max_waiting=settings.engine_waiting,
        cache_bytes=settings.engine_cache_bytes,
        max_adapters=settings.engine_adapters,
        adapter_disk_bytes=settings.engine_disk_bytes,
        threads=settings.engine_threads,
        vllm_python=_vllm_python(settings, row.device or ""),
    )


def _vllm_python(settings: ServerSettings, device: str) -> str | None:
    """vLLM's interpreter where it is to serve: on GPUs if it is installed, elsewhere only if asked for.

    On a cluster the setting itself: a node looks for its own (`launching.ray_entry`).
    """
    if settings.engine == "flash" or (settings.engine == "auto" and not device.startswith("cuda")):
        return None
    if settings.launcher == "ray":
        return settings.engine
    installed = find_engine(settings.home)
    if installed is None and settings.engine == "vllm":
        raise Unavailable("engine = vllm, which is not installed", remedy="run `flash engine install vllm`")
    return str(installed.python) if installed else None


def record_heartbeat(plane: Services, row: engines.EngineRow, beat: EngineHeartbeat) -> EngineAnswer:
    """What a host says of itself, and what is wanted of it."""
    now = plane.clock()
    stats = {**dict(list(beat.stats.items())[:200]), IDLE: beat.idle_s}
    with plane.database.write() as connection:
        in_flight = max(0, min(beat.in_flight, 10**6))
        engines.record_heartbeat(connection, row.id, in_flight=in_flight, stats=stats, now=now)
        moved = _follow(connection, row, beat, now)
        state = engines.get(connection, row.id).state
    if moved:
        plane.wake.set()
    return EngineAnswer(desired="drain" if state is EngineState.DRAINING else "serve")


def _follow(connection: Any, row: engines.EngineRow, beat: EngineHeartbeat, now: float) -> bool:
    """The state that a heartbeat leads to."""
    pid = beat.pid if 0 < beat.pid < 2**31 else None
    if beat.state == "loading":
        source, target = (EngineState.LAUNCHING,), EngineState.LOADING
        return engines.change(connection, row.id, source=source, target=target, now=now, pid=pid)
    if beat.state == "ready" and beat.url is not None:
        early = (EngineState.LAUNCHING, EngineState.LOADING)
        values = {"pid": pid, "url": beat.url[:500], "ready_at": now}
        return engines.change(connection, row.id, source=early, target=EngineState.READY, now=now, **values)
    if beat.state == "failed":
        told = beat.error or Unavailable("the engine failed").to_wire()
        reason = str(told.get("message") or "the engine failed")[:2000]
        target = EngineState.DRAINING
        return engines.change(
            connection, row.id, source=STARTED, target=target, now=now, error=told, reason=reason
        )
    if beat.state == "leaving":
        target, reason = EngineState.DRAINING, "it left by itself"
        return engines.change(connection, row.id, source=STARTED, target=target, now=now, reason=reason)
    return False


def _last_words(work_dir: Path) -> str | None:
    """The end of a dead host's log."""
    try:
        with (work_dir / "host.log").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL))
            return file.read().decode("utf-8", "replace").strip() or None
    except OSError:
        return None
