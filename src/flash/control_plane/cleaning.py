"""What nobody needs any more: half-written objects, folders of ended runs and engines, objects that no checkpoint
names.

Owns what may go and when; everything waits out a grace period first. A failure leaves the rest for the next
time, and what takes long is done a piece at a time: cleaning never holds up a run.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator

from flash.artifacts.manifests import adapter_only, manifest_key, object_digests, object_key
from flash.control_plane.retaining import expire
from flash.control_plane.services import Services
from flash.errors import FlashError
from flash.launching.accounts import remove_quarters
from flash.storage import engines, runs

log = logging.getLogger("flash.cleaning")

_OTHERS_S = 0.001  # from one step to the next: a lock that is taken again at once leaves out those who wait for it


class Cleaner:
    """`clean` may be called as often as one likes; a round begins at most once per `clean_interval_s`."""

    def __init__(self, plane: Services) -> None:
        self._plane = plane
        self._last: float | None = None  # when the last round began
        self._round: Iterator[None] | None = None  # what is left of it
        self._term = plane.lead.term
        self._strangers: dict[str, float] = {}  # runs in the store that the database lacks: since when seen

    def clean(self) -> None:
        """Works for `clean_budget_s` and a step; the next call goes on with what is left."""
        now, settings = time.monotonic(), self._plane.settings
        if self._term != self._plane.lead.term:  # what was found to be nobody's in another term may be somebody's now
            self._term, self._round = self._plane.lead.term, None
        if self._round is None:
            if self._last is not None and now - self._last < settings.clean_interval_s:
                return
            self._last, self._round = now, self._steps()
        for _ in self._round:
            if time.monotonic() - now >= settings.clean_budget_s:
                return
            time.sleep(_OTHERS_S)
        self._round = None

    def _steps(self) -> Iterator[None]:
        """Each is a transaction, or some requests to the store."""
        parts = (self._expired, self._half_written, self._ended_runs, self._ended_engines, self._unknown_runs)
        for part in parts:
            try:
                yield from part()
            except (FlashError, OSError) as error:
                log.warning("cleaning up is put off: %s", error)
                yield

    def _expired(self) -> Iterator[None]:
        return expire(self._plane)

    def _half_written(self) -> Iterator[None]:
        self._plane.store.sweep(older_than_s=self._plane.settings.draft_grace_s)
        yield

    def _ended_runs(self) -> Iterator[None]:
        plane = self._plane
        before = plane.clock() - plane.settings.work_grace_s
        with plane.database.read() as connection:
            ended = runs.uncleaned(connection, before=before)
        for run_id in ended:
            yield from _remove_unnamed(plane, run_id)
            shutil.rmtree(plane.settings.home / "work" / run_id, ignore_errors=True)
            remove_quarters(f"{run_id}.*")
            with plane.database.write() as connection:
                runs.note_cleaned(connection, run_id, now=plane.clock())
            yield

    def _ended_engines(self) -> Iterator[None]:
        plane = self._plane
        before = plane.clock() - plane.settings.work_grace_s
        with plane.database.read() as connection:
            ended = engines.ended(connection, before=before)
        for engine in ended:
            shutil.rmtree(engine.work_dir, ignore_errors=True)
            with plane.database.write() as connection:
                engines.forget(connection, engine.id)
            yield

    def _unknown_runs(self) -> Iterator[None]:
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
                        yield


def _remove_unnamed(plane: Services, run_id: str) -> Iterator[None]:
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
            yield
