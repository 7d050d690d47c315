"""The second line behind the workers' own redaction: what a worker says is kept without its run's secrets.

Owns which values those are and what of a worker's words is looked through. A worker that redacts, as ours do, is
left as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from flash.artifacts.store import credentials
from flash.control_plane.services import Services
from flash.records import EventKind, Finish, Manifest, WorkerEvent
from flash.redaction import Redactor


def redactor_for(plane: Services, connection: Connection, run_id: str) -> Redactor:
    """For the run's secrets, which are here until it ends, and those that its worker has from the operator."""
    own = [os.environ.get("HF_TOKEN", ""), *credentials(plane.store.options)]
    return Redactor([*plane.vault.open_all(connection, run_id).values(), *own])


def redacted_events(redactor: Redactor, events: Sequence[WorkerEvent]) -> list[WorkerEvent]:
    return [event.model_copy(update={"data": _data(redactor, event)}) for event in events]


def redacted_finish(redactor: Redactor, finish: Finish) -> Finish:
    return finish.model_copy(update={"error": redactor.value(finish.error)})


def redacted_manifest(redactor: Redactor, manifest: Manifest) -> Manifest:
    """As it is recorded: its metrics may have been named by the environment."""
    return manifest.model_copy(update={"metrics": redactor.value(manifest.metrics)})


def _data(redactor: Redactor, event: WorkerEvent) -> dict[str, Any]:
    data: dict[str, Any] = redactor.value(event.data)
    if event.kind is EventKind.LOG and isinstance(data.get("text"), str):
        data["text"] = redactor.piece(data["text"])  # a long line comes in several
    return data
