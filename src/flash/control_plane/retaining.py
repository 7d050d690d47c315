"""Takes leave of what was kept long enough. What that is, and who still needs it, is `storage.retention`'s to say."""

from __future__ import annotations

import logging

from flash.artifacts.manifests import environment_key
from flash.control_plane.services import Services
from flash.storage import audit, retention

log = logging.getLogger("flash.retaining")


def expire(plane: Services) -> None:
    """One round, in transactions of their own so that others have their turns; the next round goes on."""
    times, now = plane.settings.times, plane.clock()
    for what, choose in (
        ("optimizer state", retention.expire_states),
        ("checkpoints", retention.expire_files),
        ("events", retention.expire_events),
    ):
        with plane.database.write() as connection:
            found = choose(connection, times, now=now)
        if found:
            log.info("kept long enough: %s of %d run(s), %s, …", what, len(found), found[0])
    with plane.database.write() as connection:
        for sha256 in retention.expire_environments(connection, times, now=now):
            plane.store.delete(environment_key(sha256))
    if times.audit_s is not None:
        with plane.database.write() as connection:
            audit.forget(connection, before=now - times.audit_s)
