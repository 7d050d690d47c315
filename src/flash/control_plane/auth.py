"""Who may: bearer tokens of people, of attempts and of engines, as route dependencies.

Every route has one of them, and a test walks all routes to see it. Who called is left in `request.state.caller` for
the audit log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Request

from flash.control_plane.services import Services
from flash.control_plane.tickets import open_ticket
from flash.errors import Conflict, Forbidden, Unauthorized
from flash.records import AttemptState, EngineState
from flash.storage import engines, identity, runs
from flash.storage.identity import Caller, Role


# What reads nothing is a coroutine: FastAPI sends any other dependency through a thread, for every request.
async def services_of(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


Plane = Annotated[Services, Depends(services_of)]


async def _bearer(authorization: Annotated[str | None, Header()] = None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("no bearer token", remedy="send `Authorization: Bearer <key>`")
    return token.strip()


Bearer = Annotated[str, Depends(_bearer)]


def _caller(request: Request, plane: Plane, token: Bearer) -> Caller:
    with plane.database.read() as connection:
        found = identity.find_caller(connection, token)
        if found is None:
            request.state.caller = identity.find_revoked(connection, token)  # the audit log names it
            raise Unauthorized("the key is not valid here", remedy="`flash login`, or check FREESOLO_API_KEY")
    request.state.caller = found
    return found


class Needs:
    """A route's rule: the least role that may call it. Without one, looking takes a reader, all else a member."""

    def __init__(self, role: Role | None = None) -> None:
        self.role = role

    async def __call__(self, request: Request, caller: Annotated[Caller, Depends(_caller)]) -> Caller:
        needed = self.role or (Role.READ_ONLY if request.method in _LOOKING else Role.MEMBER)
        if caller.role < needed:
            raise Forbidden(
                f"this takes the role {needed.word}, and the key is {caller.role.word}",
                remedy="ask an admin of your org for another key",
            )
        return caller


_LOOKING = ("GET", "HEAD")

Me = Annotated[Caller, Depends(Needs())]
Reader = Annotated[Caller, Depends(Needs(Role.READ_ONLY))]
Admin = Annotated[Caller, Depends(Needs(Role.ADMIN))]
Owner = Annotated[Caller, Depends(Needs(Role.OWNER))]


@dataclass(frozen=True)
class WorkerIdentity:
    """A worker whose token fits its attempt; whether it may still write is checked with each write."""

    attempt_id: str
    run_id: str
    epoch: int


def _worker(plane: Plane, token: Bearer, attempt_id: str) -> WorkerIdentity:
    run_id, epoch = runs.split_attempt_id(attempt_id)
    with plane.database.read() as connection:
        attempt = runs.get_attempt(connection, run_id, epoch)
    if not attempt.token_sha256 or not identity.matches(token, attempt.token_sha256):
        raise Unauthorized("the token is not this attempt's")
    return WorkerIdentity(attempt_id, run_id, epoch)


Worker = Annotated[WorkerIdentity, Depends(_worker)]


def _engine(plane: Plane, token: Bearer, engine_id: str) -> engines.EngineRow:
    """The engine whose host speaks; Conflict tells one that is over to exit."""
    with plane.database.read() as connection:
        row = engines.get(connection, engine_id)
    if not row.token_sha256 or not identity.matches(token, row.token_sha256):
        raise Unauthorized("the token is not this engine's")
    if row.state in (EngineState.ENDING, EngineState.ENDED):
        raise Conflict(f"engine {row.id} is {row.state.value}", remedy="this host must exit")
    return row


EngineHost = Annotated[engines.EngineRow, Depends(_engine)]


@dataclass(frozen=True)
class Launched:
    """A worker that was launched with a ticket; whether anybody still waits for it is checked by the route."""

    worker_id: str
    token: str = field(repr=False)


def _launched(plane: Plane, ticket: Bearer, worker_id: str) -> Launched:
    return Launched(worker_id, open_ticket(plane.vault, worker_id, ticket))


Ticket = Annotated[Launched, Depends(_launched)]


def require_live(attempt: runs.AttemptRow, epoch: int, *, states: tuple[AttemptState, ...]) -> None:
    """Fences writes: Conflict for a stale epoch or an attempt that is not in one of `states` any more."""
    if epoch != attempt.epoch:
        raise Conflict(f"epoch {epoch} does not fit attempt {attempt.id}")
    if attempt.state not in states:
        raise Conflict(f"attempt {attempt.id} is {attempt.state.value}", remedy="this worker must exit")
