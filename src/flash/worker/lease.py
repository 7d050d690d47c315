"""The attempt's lease: kept alive by heartbeats, and given up in time when it can't be.

Owns the heartbeat thread and the clock by which this worker may still act. Knows nothing of processes; it
tells its owner three things: the plane wants a cancel, the attempt no longer counts, the lease is lost.
The clock is monotonic and in this process, so a change of the machine's time means nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from flash.errors import Conflict, FlashError, Unauthorized
from flash.records import Heartbeat, HeartbeatAnswer, Phase
from flash.worker.settings import WorkerSettings


class Pulse:
    """What a heartbeat tells: phase, step and a counter that rises whenever anything moved forward."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = Phase.STARTING
        self._step = 0
        self._progress = 0

    def advance(self, *, phase: Phase | None = None, step: int | None = None) -> None:
        with self._lock:
            self._progress += 1
            self._phase = phase or self._phase
            self._step = max(self._step, step or 0)

    def beat(self, epoch: int) -> Heartbeat:
        with self._lock:
            return Heartbeat(epoch=epoch, phase=self._phase, step=self._step, progress=self._progress)


class HeartbeatReceiver(Protocol):
    def heartbeat(self, beat: Heartbeat, *, timeout_s: float) -> HeartbeatAnswer: ...


class Lease(threading.Thread):
    """Renews the lease every `interval_s`; the owner asks `held` before it acts on the world.

    A renewal counts from when it was sent, not from when it was answered: the plane's clock started in
    between. `on_lost` comes `lease_margin` before the end, so that there is time to kill the children.
    """

    def __init__(
        self,
        api: HeartbeatReceiver,
        pulse: Pulse,
        settings: WorkerSettings,
        *,
        epoch: int,
        interval_s: float,
        lease_s: float,
        claimed_at: float,
        on_cancel: Callable[[], None],
        on_fenced: Callable[[FlashError], None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._api = api
        self._pulse = pulse
        self._settings = settings
        self._epoch = epoch
        self._interval_s = interval_s
        self._until = claimed_at + lease_s * (1 - settings.lease_margin)
        self._on_cancel = on_cancel
        self._on_fenced = on_fenced
        self._on_lost = on_lost
        self._ending = threading.Event()
        self._cancelled = False

    @property
    def held(self) -> bool:
        """Whether this worker may still act."""
        return time.monotonic() < self._until

    def end(self) -> None:
        self._ending.set()

    def run(self) -> None:
        while not self._ending.is_set():
            sent = time.monotonic()
            if sent >= self._until:
                self._on_lost()
                return
            try:
                # Short of what is left, so that a beat that hangs leaves room for another.
                patience_s = max(min(self._interval_s, self._until - sent), 0.05)
                answer = self._api.heartbeat(self._pulse.beat(self._epoch), timeout_s=patience_s)
            except (Conflict, Unauthorized) as error:
                self._on_fenced(error)
                return
            except FlashError:  # unreachable, or a plane that is starting: the next beat may get through
                self._ending.wait(min(self._interval_s / 2, max(self._until - time.monotonic(), 0.0)))
                continue
            self._until = sent + answer.lease_s * (1 - self._settings.lease_margin)
            if answer.desired == "cancel" and not self._cancelled:
                self._cancelled = True
                self._on_cancel()
            self._ending.wait(max(0.0, self._interval_s - (time.monotonic() - sent)))
