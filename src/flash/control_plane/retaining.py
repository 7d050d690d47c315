"""Takes leave of what was kept long enough. What that is, and who still needs it, is `storage.retention`'s to say.

Owns the order in which files and rows go, in steps that hold nobody up: a transaction takes a bounded number of rows,
and none is open while the store is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from flash.artifacts.manifests import environment_key
from flash.control_plane.services import Services
from flash.storage import audit, environments, retention

log = logging.getLogger("flash.retaining")


def expire(plane: Services) -> Iterator[None]:
    """Everything whose time is over, a step at a time. Where it stops, another call begins again."""
    times = plane.settings.times
    for what, choose in (
        ("optimizer state", retention.expire_states),
        ("checkpoints", retention.expire_files),
        ("events", retention.expire_events),
    ):
        gone: set[str] = set()
        while True:
            with plane.database.write() as connection:
                found = choose(connection, times, now=plane.clock())
            if not found:
                break
            gone.update(found)
            yield
        if gone:
            log.info("kept long enough: %s of %d run(s), %s, …", what, len(gone), min(gone))
    yield from _expire_environments(plane)
    yield from _forget_audit(plane)


def _expire_environments(plane: Services) -> Iterator[None]:
    """A version leaves first, so that nothing can come to need it; then its archive goes; then its row.

    What breaks off in between is taken up by the next round. Until the row is gone nobody can push the same content:
    it could not tell whether the archive that it finds is about to go.
    """
    while True:
        with plane.database.write() as connection:
            retention.expire_environments(connection, plane.settings.times, now=plane.clock())
            leaving = environments.leaving(connection)
        if not leaving:
            return
        yield
        for sha256 in leaving:
            plane.store.delete(environment_key(sha256))
            with plane.database.write() as connection:
                environments.forget(connection, sha256)
            yield


def _forget_audit(plane: Services) -> Iterator[None]:
    if plane.settings.times.audit_s is None:
        return
    while True:
        with plane.database.read() as connection:  # a look through the whole log, which would hold up whoever writes
            old = audit.older(connection, before=plane.clock() - plane.settings.times.audit_s)
        if not old:
            return
        with plane.database.write() as connection:
            audit.forget(connection, old)
        yield
