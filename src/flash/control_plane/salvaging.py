"""The last words of a worker that died: events that it had spooled and not yet sent.

Owns reading a dead attempt's spool where it lies within reach, which is everywhere but on another machine.
The worker is known dead, so nothing is written to the file any more; what it had sent before is skipped by
its own count, so nothing is told twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from flash.control_plane.redacting import redacted_events, redactor_for
from flash.control_plane.services import Services
from flash.records import WorkerEvent
from flash.storage import runs

log = logging.getLogger("flash.salvaging")

SPOOL = Path("spool", "events.jsonl")  # below an attempt's folder
_BATCH = 500


def salvage(plane: Services, run_id: str, epoch: int) -> int:
    """Adds what the attempt had still to say to its run's history; returns how many events that were."""
    with plane.database.read() as connection:
        attempt = runs.get_attempt(connection, run_id, epoch)
        if runs.get_run(connection, run_id).state.terminal:
            return 0
    before = attempt.acknowledged
    try:
        rest = (event for event in _spooled(Path(attempt.work_dir) / SPOOL) if event.n > before)
        while batch := list(islice(rest, _BATCH)):
            with plane.database.write() as connection:
                attempt = runs.get_attempt(connection, run_id, epoch)
                said = redacted_events(redactor_for(plane, connection, run_id), batch)
                runs.record_events(connection, attempt, said, now=plane.clock())
    except OSError as error:
        log.warning("the spool of %s.%d can't be read: %s", run_id, epoch, error)
    with plane.database.read() as connection:
        return runs.get_attempt(connection, run_id, epoch).acknowledged - before


def _spooled(path: Path) -> Iterator[WorkerEvent]:
    """The file's events up to the first line that a death left unfinished."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        for line in file:
            try:
                yield WorkerEvent.model_validate_json(line)
            except ValidationError:
                return
