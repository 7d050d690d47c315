"""What the control plane does about checkpoints: record, choose one to resume from, drop what is not kept.

Trusts no worker's word: a manifest is read from the store and every object checked before it is recorded.
"""

from __future__ import annotations

import logging

from sqlalchemy import Connection

from flash.artifacts.manifests import (
    Damaged,
    adapter_only,
    read_manifest,
    remove_checkpoint,
    remove_state,
    verify,
)
from flash.control_plane.services import Services
from flash.errors import Conflict, FlashError, NotFound
from flash.records import CheckpointReport, Manifest
from flash.storage import runs

log = logging.getLogger("flash.checkpoints")

STATES_KEPT = 2  # optimizer and generator state of that many newest checkpoints


def checked_manifest(plane: Services, run_id: str, report: CheckpointReport) -> Manifest:
    """The reported checkpoint's manifest, if it is the one in the store and its objects are all there."""
    try:
        manifest, sha256 = read_manifest(plane.store, run_id, report.step)
    except NotFound as error:
        raise Conflict(f"step {report.step} has no manifest in the store", remedy="upload it, then report") from error
    if sha256 != report.manifest_sha256 or manifest.final != report.final:
        raise Conflict(f"the manifest of step {report.step} in the store is not the one reported")
    verify(plane.store, manifest)
    return manifest


def thin_out(plane: Services, run_id: str) -> None:
    """Removes optimizer state from all but the newest checkpoints. A failure leaves it for the next time."""
    with plane.database.read() as connection:
        known = runs.checkpoints_of(connection, run_id)
        manifests = {found.step: runs.manifest_of(connection, run_id, found.step) for found in known}
    stale = [found.step for found in known[:-STATES_KEPT] if found.has_state]
    if not stale:
        return
    # Forgotten first: a checkpoint must never be taken for resumable while its state is being removed.
    with plane.database.write() as connection:
        runs.forget_state(connection, run_id, stale)
    keep = [
        manifests[found.step] if found.step not in stale and found.has_state else adapter_only(manifests[found.step])
        for found in known
    ]
    for step in stale:
        try:
            remove_state(plane.store, manifests[step], keep)
        except FlashError as error:
            log.warning("state of %s/step-%d is still in the store: %s", run_id, step, error)


def find_resume(plane: Services, run_id: str) -> Manifest | None:
    """The newest checkpoint whose state is kept and whose files are there in full, or None.

    Their bytes are the worker's to check, which reads them all anyway on its way to resume. Where the attempt
    before found other bytes than recorded, they are read here too. A damaged checkpoint is taken back, with a
    warning in the run's history, and the one before is tried. A store that can't be read now raises
    `Unavailable`: that says nothing about the checkpoints in it.
    """
    with plane.database.read() as connection:
        known = [found for found in runs.checkpoints_of(connection, run_id) if found.has_state]
        manifests = [runs.manifest_of(connection, run_id, found.step) for found in known]
        ended = [found for found in runs.attempts_of(connection, [run_id])[run_id] if found.outcome is not None]
    suspected = bool(ended) and (ended[-1].error or {}).get("code") == Damaged.code
    for manifest in reversed(manifests):
        try:
            verify(plane.store, manifest, digests=suspected)
        except Damaged as error:
            _drop(plane, manifest, str(error), keep=[other for other in manifests if other != manifest])
        else:
            return manifest
    return None


def _drop(plane: Services, manifest: Manifest, reason: str, keep: list[Manifest]) -> None:
    with plane.database.write() as connection:
        runs.drop_checkpoint(connection, manifest.run_id, manifest.step, reason=reason, now=plane.clock())
    remove_checkpoint(plane.store, manifest, keep)


def find_init(connection: Connection, run: runs.RunRow) -> Manifest | None:
    """The adapter that a warm start begins with."""
    if run.init_run_id is None or run.init_step is None:
        return None
    return adapter_only(runs.manifest_of(connection, run.init_run_id, run.init_step))
