"""What nobody needs any more: half-written objects, folders of ended runs and engines, objects that no checkpoint
names.

Owns what may go and when; everything waits out a grace period first. A failure leaves the rest for the next
time: cleaning never holds up a run.
"""

from __future__ import annotations

import logging
import shutil
import time

from flash.artifacts.manifests import adapter_only, manifest_key, object_digests, object_key
from flash.control_plane.retaining import expire
from flash.control_plane.services import Services
from flash.errors import FlashError
from flash.launching.accounts import remove_quarters
from flash.storage import engines, runs

log = logging.getLogger("flash.cleaning")


class Cleaner:
    """`clean` may be called as often as one likes; it works at most once per `clean_interval_s`."""

    def __init__(self, plane: Services) -> None:
        self._plane = plane
        self._last: float | None = None
        self._strangers: dict[str, float] = {}  # runs in the store that the database lacks: since when seen

    def clean(self) -> None:
        now = time.monotonic()
        if self._last is not None and now - self._last < self._plane.settings.clean_interval_s:
            return
        self._last = now
        for part in (self._expired, self._half_written, self._ended_runs, self._ended_engines, self._unknown_runs):
            try:
                part()
            except (FlashError, OSError) as error:
                log.warning("cleaning up is put off: %s", error)

    def _expired(self) -> None:
        expire(self._plane)

    def _half_written(self) -> None:
        self._plane.store.sweep(older_than_s=self._plane.settings.draft_grace_s)

    def _ended_runs(self) -> None:
        plane = self._plane
        before = plane.clock() - plane.settings.work_grace_s
        with plane.database.read() as connection:
            ended = runs.uncleaned(connection, before=before)
        for run_id in ended:
            _remove_unnamed(plane, run_id)
            shutil.rmtree(plane.settings.home / "work" / run_id, ignore_errors=True)
            remove_quarters(f"{run_id}.*")
            with plane.database.write() as connection:
                runs.note_cleaned(connection, run_id, now=plane.clock())

    def _ended_engines(self) -> None:
        plane = self._plane
        before = plane.clock() - plane.settings.work_grace_s
        with plane.database.read() as connection:
            ended = engines.ended(connection, before=before)
        for engine in ended:
            shutil.rmtree(engine.work_dir, ignore_errors=True)
            with plane.database.write() as connection:
                engines.forget(connection, engine.id)

    def _unknown_runs(self) -> None:
        """What a server that died while it prepared a run left in the store.

        Whole checkpoints stay, whoever's they are: their database may be another one, or be restored some day.
        """
        plane = self._plane
        with plane.database.read() as connection:
            strangers = runs.unknown(connection, plane.store.folders("runs"))
        now = time.monotonic()
        self._strangers = {run_id: self._strangers.get(run_id, now) for run_id in strangers}
        for run_id, since in list(self._strangers.items()):
            if now - since >= plane.settings.draft_grace_s:
                keys = plane.store.list(f"runs/{run_id}")
                if not any("/checkpoints/" in key for key in keys):
                    for key in keys:
                        plane.store.delete(key)


def _remove_unnamed(plane: Services, run_id: str) -> None:
    """Manifests that were never recorded, and objects that none of the recorded ones needs."""
    with plane.database.read() as connection:
        known = runs.checkpoints_of(connection, run_id)
        manifests = [runs.manifest_of(connection, run_id, found.step) for found in known]
    needed = {manifest_key(run_id, found.step) for found in known}
    for found, manifest in zip(known, manifests, strict=True):
        kept = manifest if found.has_state else adapter_only(manifest)
        needed |= {object_key(run_id, sha256) for sha256 in object_digests(kept)}
    for key in plane.store.list(f"runs/{run_id}"):
        if key not in needed:
            plane.store.delete(key)
