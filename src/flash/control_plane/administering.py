"""Orgs, keys and the audit log, for those who may see to them.

Owns who may do what to whom: an admin within its own org, the server's owner everywhere. Used by the routes, and by
`flash admin --config`, which acts on the database itself before a server can be reached. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flash.control_plane.server_config import load_server_config
from flash.errors import Forbidden, NotFound
from flash.records import AuditEntry, Key, KeyRequest, NewKey, Org
from flash.storage import audit, identity, runs, shares
from flash.storage.database import Database
from flash.storage.identity import Caller, Caps, KeyRow, OrgRow, Role


class Administration:
    """What `caller` may do on this database. Another org is as absent as one that never was."""

    def __init__(self, database: Database, caller: Caller, clock: Callable[[], float]) -> None:
        self._database = database
        self._caller = caller
        self._clock = clock

    # --- orgs -------------------------------------------------------------------------------------------

    def create_org(self, name: str) -> Org:
        with self._database.write() as connection:
            return _org(identity.create_org(connection, name, now=self._clock()))

    def orgs(self) -> list[Org]:
        with self._database.read() as connection:
            return [_org(found) for found in identity.list_orgs(connection)]

    def revoke_org(self, name: str) -> Org:
        """Its keys are good for nothing any more and its runs are cancelled; what it has stays."""
        if name == identity.LOCAL_ORG:
            raise Forbidden(f"the org {name} is the server's own and stays")
        with self._database.write() as connection:
            now = self._clock()
            before = identity.get_org(connection, name)
            identity.revoke_org(connection, name, now=now)
            for run in runs.open_runs(connection):
                if run.org_id == name:
                    runs.request_cancel(connection, run.id, now=now)
        return _org(replace(before, revoked_at=now))

    def set_share(self, name: str, share: float) -> Org:
        """The org's weight among the others where devices are scarce."""
        with self._database.write() as connection:
            shares.set_share(connection, name, share)
            return _org(identity.get_org(connection, name))

    # --- keys -------------------------------------------------------------------------------------------

    def create_key(self, request: KeyRequest) -> NewKey:
        """The answer has the key itself; nothing else ever will."""
        role = Role.named(request.role)
        if role > self._caller.role:
            raise Forbidden(f"a key of the role {role.word} takes one of that role, not {self._caller.role.word}")
        caps = Caps(request.max_usd, request.max_runs, request.max_gpus)
        with self._database.write() as connection:
            row, secret = identity.create_key(
                connection, org=self._org(request.org), name=request.name, role=role, caps=caps, now=self._clock()
            )
        return NewKey(key=_key(row), secret=secret)

    def keys(self, org: str | None) -> list[Key]:
        """An org's keys; without one an owner sees everybody's."""
        everyone = org is None and self._caller.role >= Role.OWNER
        with self._database.read() as connection:
            return [_key(row) for row in identity.list_keys(connection, org=None if everyone else self._org(org))]

    def revoke_key(self, which: str, org: str | None) -> Key:
        """By id, or within an org by name. From the next request on it is refused."""
        everyone = org is None and self._caller.role >= Role.OWNER
        with self._database.write() as connection:
            now = self._clock()
            scope = None if everyone else self._org(org)
            found = [key for key in identity.list_keys(connection, org=scope) if which in (key.id, key.name)]
            if any(key.role > self._caller.role for key in found):
                raise Forbidden("only an owner revokes an owner's key")
            row = identity.revoke_key(connection, which, org=scope, now=now)
        return _key(row).model_copy(update={"revoked_at": now})

    # --- the audit log ----------------------------------------------------------------------------------

    def audit(self, org: str | None, limit: int, before: int | None) -> list[AuditEntry]:
        """Newest first; without an org an owner sees everybody's and nobody's."""
        everyone = org is None and self._caller.role >= Role.OWNER
        with self._database.read() as connection:
            found = audit.read(connection, org=None if everyone else self._org(org), limit=limit, before=before)
        return [AuditEntry(**vars(entry)) for entry in found]

    def _org(self, asked: str | None) -> str:
        org = asked or self._caller.org
        if org != self._caller.org and self._caller.role < Role.OWNER:
            raise NotFound(f"no org {org!r:.80}")
        return org


class OnTheMachine(Administration):
    """For who can read the server's config and reach its database: the owner, with or without a server."""

    def __init__(self, config: Path) -> None:
        settings = load_server_config(config)
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._opened = Database(settings.database)
        owner = Caller(org=identity.LOCAL_ORG, role=Role.OWNER, name="the server's machine")
        super().__init__(self._opened, owner, self._opened.clock)
        with self._opened.write() as connection:
            identity.ensure_org(connection, identity.LOCAL_ORG)

    def note(self, action: str, about: str) -> None:
        """What a route's middleware would have put on record."""
        with self._opened.write() as connection:
            entry = audit.Entry(action=action, status=200, actor=audit.SERVER, name=self._caller.name, object=about)
            audit.record(connection, entry, now=self._opened.clock())

    def close(self) -> None:
        self._opened.close()


def _org(row: OrgRow) -> Org:
    return Org(name=row.id, created_at=row.created_at, revoked_at=row.revoked_at, share=row.share)


def _key(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        org=row.org,
        name=row.name,
        role=row.role.word,
        max_usd=row.caps.max_usd,
        max_runs=row.caps.max_runs,
        max_gpus=row.caps.max_gpus,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )
