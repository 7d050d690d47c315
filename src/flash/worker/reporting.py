"""What an attempt says: events in order, from the moment they happen until the control plane has them.

Owns the spool (a local append-only file), the sender that empties it, and the intake of what children print.
Knows nothing of processes, checkpoints or what an event means. Nothing is lost in silence: what a cap or a
refusal takes away leaves a line that says so.

A sink is anything that wants to see every event as it happens (a metrics logger, say); a sink never fails
or holds up the run.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flash.errors import Conflict, FlashError, Unauthorized, Unavailable
from flash.failpoints import failpoint
from flash.records import EventAck, EventBatch, EventKind, WorkerEvent
from flash.redaction import Redactor, storable
from flash.worker.api import backoff
from flash.worker.settings import WorkerSettings

# --- what fits an event ---------------------------------------------------------------------------------


def _finite(kind: EventKind, data: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: such metrics leave `values` and are named in `non_finite`, others are null."""
    if kind is EventKind.METRICS and isinstance(data.get("values"), dict):
        odd = {name: value for name, value in data["values"].items() if _non_finite(value)}
        if odd:
            kept = {name: value for name, value in data["values"].items() if name not in odd}
            data = {**data, "values": kept, "non_finite": {name: str(value) for name, value in odd.items()}}
    return {key: _nulled(value) for key, value in data.items()}


def _non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(item) for item in value]
    return None if _non_finite(value) else value


# --- the spool ----------------------------------------------------------------------------------------


class Sink(Protocol):
    """Sees every event, redacted, in order, as it is spooled."""

    def __call__(self, event: WorkerEvent) -> None: ...


class AttemptSink(Sink, Protocol):
    """A sink with an end, which may run a process of its own (`pid`) that survives the attempt for a while."""

    pid: int

    def end(self) -> None:
        """No more events will come."""

    def close(self, wait_s: float) -> None:
        """Waits up to `wait_s` for the sink to be done, and warns of what went wrong with it."""


Warn = Callable[[str, str], object]  # code, text


class EventSpool:
    """An append-only file of events, numbered from 1, and how far they are acknowledged.

    Only offsets are in memory, so a long outage costs disk, not memory. Opening an existing spool goes on
    after its last whole line. Safe to use from several threads.
    """

    def __init__(
        self,
        path: Path,
        redactor: Redactor,
        *,
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._redactor = redactor
        self._sinks = list(sinks)
        self._clock = clock
        self._changed = threading.Condition()
        self._out = path.open("ab", buffering=0)  # what was appended outlives this process
        self._file = path.open("rb")
        self._written = self._end = self._drop_torn_line()
        self.last = self._count()      # n of the newest event
        self.acknowledged = 0          # every event up to here is with the control plane
        self._acknowledged_end = 0     # the file offset behind it
        self._closed = False
        self._synced = self._written

    def add_sink(self, sink: Sink) -> None:
        """Tells this sink of every event from now on."""
        with self._changed:
            self._sinks.append(sink)

    def append(self, kind: EventKind, data: dict[str, Any]) -> WorkerEvent:
        """Raises Unavailable, and keeps nothing of the event, when the disk takes it no more."""
        with self._changed:
            event = WorkerEvent(
                n=self.last + 1,
                time=self._clock(),
                kind=kind,
                data=self._redactor.value(_finite(kind, data)),
            )
            line = event.model_dump_json().encode() + b"\n"
            self._write(line)
            self.last = event.n
            self._end += len(line)
            self._changed.notify_all()
            self._tell_sinks(event)
        return event

    def _write(self, line: bytes) -> None:
        """The whole line or nothing: half a line would garble what follows."""
        try:
            written = self._out.write(line)
            if written != len(line):  # the disk has just become full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._out.truncate(self._end)
            raise Unavailable(
                f"events can't be kept: {error.strerror}", remedy="free space where FLASH_HOME is"
            ) from error

    def _tell_sinks(self, event: WorkerEvent) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception as error:  # a sink is somebody else's code: it goes, the run goes on
                self._sinks.remove(sink)
                logging.getLogger(__name__).warning("a sink failed and is left out from here on: %r", error)

    def sync(self) -> None:
        """What was appended so far survives a crash of this machine."""
        with self._changed:
            if self._synced == self._end:
                return
            written = self._end
            os.fsync(self._out.fileno())
            self._written = self._synced = written

    def unacknowledged(self, *, events: int, size: float) -> tuple[WorkerEvent, ...]:
        """The oldest synced events that the control plane lacks: at most `events`, about `size` bytes, at least one."""
        batch: list[WorkerEvent] = []
        with self._changed:
            self._file.seek(self._acknowledged_end)
            total = 0
            while len(batch) < events and self._acknowledged_end + total < self._written:
                line = self._file.readline()
                if batch and total + len(line) > size:
                    break
                batch.append(WorkerEvent.model_validate_json(line))
                total += len(line)
        return tuple(batch)

    def acknowledge(self, n: int) -> None:
        """The control plane has every event up to `n`."""
        with self._changed:
            self._file.seek(self._acknowledged_end)
            while self.acknowledged < min(n, self.last):
                self._acknowledged_end += len(self._file.readline())
                self.acknowledged += 1
            self._changed.notify_all()

    @property
    def pending(self) -> int:
        """How many events still wait to be acknowledged."""
        return self.last - self.acknowledged

    def wait_for_events(self, timeout_s: float) -> bool:
        """Until there is something to send, or the time is over, or the spool is closed."""
        with self._changed:
            return self._changed.wait_for(lambda: self.pending > 0 or self._closed, timeout_s)

    def wait_acknowledged(self, timeout_s: float) -> bool:
        """Until the control plane has everything."""
        with self._changed:
            return self._changed.wait_for(lambda: self.pending == 0, timeout_s)

    def close(self) -> None:
        self.sync()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._file.close()
            self._out.close()

    def _drop_torn_line(self) -> int:
        """Cuts a line that a crash left half-written; returns the file's size."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._out.truncate(whole)
        return whole

    def _count(self) -> int:
        self._file.seek(0)
        return sum(1 for _ in self._file)


# --- the sender ---------------------------------------------------------------------------------------


class EventReceiver(Protocol):
    def send_events(self, batch: EventBatch) -> EventAck: ...


class Sender(threading.Thread):
    """Empties the spool into the control plane: batches in order, each repeated until it is acknowledged.

    Ends when told to, or when the plane says that the attempt no longer counts (`on_fenced` is called once).
    """

    def __init__(
        self,
        spool: EventSpool,
        api: EventReceiver,
        epoch: int,
        settings: WorkerSettings,
        *,
        on_fenced: Callable[[FlashError], None],
    ) -> None:
        super().__init__(name="event sender", daemon=True)
        self._spool = spool
        self._api = api
        self._epoch = epoch
        self._settings = settings
        self._on_fenced = on_fenced
        self._ending = threading.Event()
        self._hurry = threading.Event()

    def flush(self, timeout_s: float) -> bool:
        """Sends without gathering; true once everything spooled is acknowledged."""
        self._hurry.set()
        try:
            return self._spool.wait_acknowledged(timeout_s)
        finally:
            self._hurry.clear()

    def end(self) -> None:
        self._ending.set()
        self._hurry.set()

    def run(self) -> None:
        while not self._ending.is_set():
            if not self._spool.wait_for_events(self._settings.event_interval_s):
                continue
            self._hurry.wait(self._settings.event_interval_s)  # gather, so that a batch is more than one event
            try:
                self._spool.sync()
            except OSError:  # a disk in trouble; events are sent only once they are safe
                self._ending.wait(self._settings.retry_most_s)
                continue
            try:
                self._send_batch()
            except (Conflict, Unauthorized) as error:
                self._on_fenced(error)
                return

    def _send_batch(self) -> None:
        limit = self._settings.event_batch
        waits = backoff(self._settings)
        while not self._ending.is_set():
            events = self._spool.unacknowledged(events=limit, size=self._settings.event_batch_bytes)
            if not events:
                return
            try:
                failpoint("events.synced")
                answer = self._api.send_events(EventBatch(epoch=self._epoch, events=events))
                failpoint("events.sent")
            except Unavailable:
                self._ending.wait(next(waits))
            except (Conflict, Unauthorized):
                raise
            except FlashError as error:
                if len(events) > 1:
                    limit = max(1, len(events) // 2)  # corner the event that the plane won't take
                else:
                    self._replace(events[0], error)
                    return
            else:
                self._spool.acknowledge(answer.acknowledged)
                return

    def _replace(self, event: WorkerEvent, error: FlashError) -> None:
        """Sends a note in the place of an event that the plane refuses; the gap is shown, and the rest goes on."""
        note = WorkerEvent(
            n=event.n,
            time=event.time,
            kind=EventKind.WARNING,
            data={"code": "event_refused", "text": f"a {event.kind.value} event was refused: {error.message}"[:500]},
        )
        try:
            answer = self._api.send_events(EventBatch(epoch=self._epoch, events=(note,)))
        except Unavailable:
            return  # comes round again with the next batch
        self._spool.acknowledge(answer.acknowledged)


# --- what children print ------------------------------------------------------------------------------

_LINE_ENDS = re.compile(r"\r\n|\n|\r")  # a lone \r is a progress bar redrawing its line
_LINE_COST = 64  # bytes that an event costs beside its text


class LogIntake:
    """Turns one child's raw output into lines: decoded, redacted, split and kept under a byte rate.

    `emit` gets each line. A flood past the rate is counted and shown as one line, "… N lines dropped". For
    one thread; the owner calls `tick` now and then so that the note doesn't wait for more output.
    """

    def __init__(
        self,
        emit: Callable[[str], None],
        redactor: Redactor,
        settings: WorkerSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._emit = emit
        self._redactor = redactor
        self._settings = settings
        self._clock = clock
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""     # may be the beginning of a secret
        self._line = ""     # has no end yet
        self._budget = settings.log_burst_bytes
        self._filled_at = clock()
        self.dropped = 0    # lines since the last one shown

    def feed(self, chunk: bytes) -> None:
        self._take(self._decoder.decode(chunk))

    def tick(self) -> None:
        """Shows the note on dropped lines as soon as there is room for it."""
        self._refill()
        if self.dropped and self._budget >= self._settings.log_line_chars:
            self._show_gap()

    def close(self) -> None:
        """The stream ended: shows what was held back, and any gap."""
        self._take(self._decoder.decode(b"", final=True), final=True)
        if self._line:
            self._show(self._line)
            self._line = ""
        if self.dropped:
            self._show_gap()

    def _take(self, text: str, *, final: bool = False) -> None:
        text = self._redactor.text(self._held + text)
        keep = 0 if final else self._redactor.held_back(text)
        self._held = text[len(text) - keep :]
        text = self._line + text[: len(text) - keep]
        if not final and not keep and text.endswith("\r"):  # may be half of \r\n
            self._held, text = "\r", text[:-1]
        *lines, self._line = _LINE_ENDS.split(text)
        self._refill()
        for line in lines:
            self._show(line)
        while len(self._line) > self._settings.log_line_chars:
            self._show(self._line[: self._settings.log_line_chars])
            self._line = self._line[self._settings.log_line_chars :]

    def _show(self, line: str) -> None:
        if not line.strip():
            return
        size = self._settings.log_line_chars
        for start in range(0, len(line), size):
            piece = storable(line[start : start + size])
            cost = len(piece.encode()) + _LINE_COST
            if self.dropped and self._budget >= cost + size:
                self._show_gap()
            if self.dropped or self._budget < cost:
                self.dropped += 1
                continue
            self._budget -= cost
            self._emit(piece)

    def _show_gap(self) -> None:
        lines = "line" if self.dropped == 1 else "lines"
        self._emit(f"… {self.dropped} {lines} dropped: more output than the log keeps")
        self.dropped = 0

    def _refill(self) -> None:
        now = self._clock()
        grown = self._budget + (now - self._filled_at) * self._settings.log_bytes_per_s
        self._budget = min(grown, self._settings.log_burst_bytes)
        self._filled_at = now
