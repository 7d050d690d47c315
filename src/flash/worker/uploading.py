"""Checkpoints on their way from a local folder to the artifact store and the run's record.

Owns one thread, which uploads one checkpoint at a time: objects, then the manifest, then the report to the
control plane. While one is in flight the newest waiting one wins; the final one is never passed over. Knows
nothing of processes or of what is in a checkpoint.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flash.artifacts.manifests import write_checkpoint
from flash.artifacts.store import Objects
from flash.errors import Conflict, FlashError, Unauthorized, Unavailable
from flash.failpoints import failpoint
from flash.records import CheckpointReport
from flash.worker.api import backoff
from flash.worker.settings import WorkerSettings

_REJECTIONS = 3  # times the plane may find a fresh upload incomplete before we stop believing in the store


@dataclass(frozen=True)
class LocalCheckpoint:
    """A complete folder, never written again."""

    folder: Path
    step: int
    final: bool
    metrics: Mapping[str, float]


class CheckpointReceiver(Protocol):
    def report_checkpoint(self, report: CheckpointReport) -> None: ...


class Uploader(threading.Thread):
    """Uploads what `submit` hands over. Local folders go once they are uploaded or passed over, the newest stays.

    `log(text)` tells the run's log what happened, `warn(text)` its status too, once when uploads begin to fail;
    `on_progress` is called whenever a checkpoint has moved; `on_fenced` once, when the plane says that the attempt
    no longer counts, which ends the thread.
    """

    def __init__(
        self,
        store: Objects,
        api: CheckpointReceiver,
        run_id: str,
        epoch: int,
        settings: WorkerSettings,
        *,
        log: Callable[[str], None],
        warn: Callable[[str], None],
        on_progress: Callable[[], None],
        on_fenced: Callable[[FlashError], None],
    ) -> None:
        super().__init__(name="uploader", daemon=True)
        self._store = store
        self._api = api
        self._run_id = run_id
        self._epoch = epoch
        self._settings = settings
        self._log = log
        self._warn = warn
        self._on_progress = on_progress
        self._on_fenced = on_fenced
        self._changed = threading.Condition()
        self._waiting: list[LocalCheckpoint] = []  # oldest first: at most one save, at most one final
        self._busy: LocalCheckpoint | None = None
        self._newest: LocalCheckpoint | None = None
        self._ended = False
        self.uploaded: list[int] = []                # steps that the plane has verified
        self.final_step: int | None = None           # the verified final checkpoint's step
        self.error: FlashError | None = None         # why the last upload has not succeeded, yet or for good

    def submit(self, checkpoint: LocalCheckpoint) -> None:
        """Returns at once. A waiting checkpoint that isn't final gives way to this one."""
        with self._changed:
            passed_over = [waiting for waiting in self._waiting if not waiting.final]
            self._waiting = [waiting for waiting in self._waiting if waiting.final]
            self._waiting.append(checkpoint)
            previous, self._newest = self._newest, checkpoint
            self._changed.notify_all()
            busy = self._busy
        for skipped in passed_over:
            self._log(f"step {skipped.step} was not uploaded: step {checkpoint.step} was ready before its turn")
            if skipped.folder != checkpoint.folder:
                _remove(skipped.folder)
        settled = previous is not None and previous is not busy and previous.step in self.uploaded
        if settled and previous is not None and previous.folder != checkpoint.folder:
            _remove(previous.folder)

    @property
    def pending(self) -> bool:
        """Whether anything handed over is still on its way."""
        with self._changed:
            return bool(self._waiting or self._busy)

    def flush(self, patience_s: float, *, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until everything handed over is verified; false when the time is over or `until` says stop."""
        deadline = time.monotonic() + patience_s
        with self._changed:
            while self._waiting or self._busy:
                left = deadline - time.monotonic()
                if left <= 0 or self._ended or until():
                    return False
                self._changed.wait(min(left, 0.1))
            return self.error is None

    def end(self) -> None:
        """Starts nothing new; what is in flight ends with the process."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def run(self) -> None:
        while (checkpoint := self._next()) is not None:
            try:
                self._upload(checkpoint)
            except (Conflict, Unauthorized) as error:
                self.end()
                self._on_fenced(error)
                return
            finally:
                with self._changed:
                    self._busy = None
                    self._changed.notify_all()

    def _next(self) -> LocalCheckpoint | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if self._ended:
                return None
            self._busy = self._waiting.pop(0)
            return self._busy

    def _upload(self, checkpoint: LocalCheckpoint) -> None:
        """Until it is verified, or a newer one waits, or it turns out to be impossible."""
        waits = backoff(self._settings)
        rejections = 0
        while True:
            try:
                self._upload_once(checkpoint)
                break
            except (Conflict, Unauthorized):
                raise
            except FlashError as error:
                if self.error is None:
                    self._warn(f"uploading step {checkpoint.step} failed and is tried again: {error}")
                self.error = error
                rejections += not isinstance(error, Unavailable)
            except OSError as error:
                self.error = Unavailable(f"step {checkpoint.step} can't be read: {error}")
                rejections += 1
            if rejections >= _REJECTIONS or self._give_way(checkpoint, next(waits)):
                self._log(f"step {checkpoint.step} was not uploaded: {self.error}")
                return
        self.error = None
        with self._changed:
            self.uploaded.append(checkpoint.step)
            if checkpoint.final:
                self.final_step = checkpoint.step
            outdated = self._newest is not None and self._newest.folder != checkpoint.folder
        if outdated:
            _remove(checkpoint.folder)

    def _upload_once(self, checkpoint: LocalCheckpoint) -> None:
        manifest, sha256 = write_checkpoint(
            self._store,
            self._run_id,
            checkpoint.step,
            checkpoint.folder,
            checkpoint.final,
            checkpoint.metrics,
            part_bytes=max(1, self._settings.upload_part_bytes),
        )
        self._on_progress()
        report = CheckpointReport(
            epoch=self._epoch, step=checkpoint.step, final=manifest.final, manifest_sha256=sha256
        )
        self._api.report_checkpoint(report)
        failpoint("upload.reported")
        self._on_progress()

    def _give_way(self, checkpoint: LocalCheckpoint, wait_s: float) -> bool:
        """Waits before a repeat; true when it shouldn't be repeated, since a newer checkpoint is ready or all ends."""

        def newer() -> bool:
            return bool(self._waiting) and not checkpoint.final

        with self._changed:
            return self._changed.wait_for(lambda: self._ended or newer(), wait_s)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
