"""Who calls: organisations, API keys, what a key may do and use.

A key is kept as its SHA-256 only and can't be read back; its id is the beginning of that digest, so it says nothing
of the key. Caps are kept here and held against what a key's runs take in `spent_by`; who enforces them is the control
plane.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sqlalchemy import Connection, insert, select, update

from flash.errors import Conflict, InvalidInput, NotFound
from flash.storage import schema

LOCAL_ORG = "local"
MACHINE = "this machine"  # how the names of servers' own tokens begin; nobody else's key may be called so
KEY_PREFIX = "fslo_"
ATTEMPT_PREFIX = "fslw_"
_ID_DIGITS = 12
_ORG = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


class Role(IntEnum):
    """Each may do what those below it may."""

    READ_ONLY = 1  # looks
    MEMBER = 2     # submits, cancels, deploys, asks models
    ADMIN = 3      # makes and revokes the org's keys, reads its audit log
    OWNER = 4      # runs the server: makes orgs, stops it; a machine's own token

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")

    @classmethod
    def named(cls, word: str) -> Role:
        """InvalidInput for a word that is no role."""
        for role in cls:
            if role.word == word:
                return role
        known = ", ".join(role.word for role in cls)
        raise InvalidInput(f"role = {word!r:.80}: must be one of {known}")


@dataclass(frozen=True)
class Caps:
    """What a key may use; None: as much as there is."""

    max_usd: float | None = None  # of all its runs together
    max_runs: int | None = None  # unfinished at once
    max_gpus: int | None = None  # of its unfinished runs together


@dataclass(frozen=True)
class Caller:
    org: str
    role: Role
    key_id: str = ""
    name: str = ""
    caps: Caps = field(default_factory=Caps)


@dataclass(frozen=True)
class KeyRow:
    """A key without itself."""

    id: str
    org: str
    name: str
    role: Role
    caps: Caps
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True)
class OrgRow:
    id: str
    created_at: float
    revoked_at: float | None
    share: float = 1.0  # its weight where devices are scarce


def new_token(prefix: str = KEY_PREFIX) -> str:
    """256 random bits behind a prefix that scanners can recognise."""
    return prefix + secrets.token_urlsafe(32)


def fingerprint(token: str) -> str:
    """SHA-256 in hex. Tokens are random, so a plain hash is enough: there is nothing to guess."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def matches(token: str, sha256: str) -> bool:
    return hmac.compare_digest(fingerprint(token), sha256)


# --- orgs -------------------------------------------------------------------------------------------------


def ensure_org(connection: Connection, org: str) -> None:
    if connection.execute(select(schema.orgs.c.id).where(schema.orgs.c.id == org)).first() is None:
        connection.execute(insert(schema.orgs).values(id=org, created_at=time.time()))


def create_org(connection: Connection, org: str, *, now: float) -> OrgRow:
    """A new org; Conflict if the name was ever taken, InvalidInput if it can't be one."""
    if not _ORG.fullmatch(org):
        raise InvalidInput(
            f"org = {org!r:.80}: must be lower-case letters, digits, dots, dashes and underscores, 63 at most",
            remedy="it is the namespace of the org's environments",
        )
    if connection.execute(select(schema.orgs.c.id).where(schema.orgs.c.id == org)).first() is not None:
        raise Conflict(f"there is, or was, an org {org}", remedy="flash admin org list shows them")
    connection.execute(insert(schema.orgs).values(id=org, created_at=now))
    return OrgRow(org, now, None)


def list_orgs(connection: Connection) -> list[OrgRow]:
    rows = connection.execute(select(schema.orgs).order_by(schema.orgs.c.id))
    return [OrgRow(row.id, row.created_at, row.revoked_at, row.share) for row in rows]


def get_org(connection: Connection, org: str) -> OrgRow:
    """An org that has not been revoked; NotFound otherwise."""
    row = connection.execute(select(schema.orgs).where(schema.orgs.c.id == org)).first()
    if row is None or row.revoked_at is not None:
        raise NotFound(f"no org {org!r:.80}", remedy="flash admin org create makes one")
    return OrgRow(row.id, row.created_at, row.revoked_at, row.share)


def revoke_org(connection: Connection, org: str, *, now: float) -> None:
    """The org's keys are good for nothing from now on; what it has stays."""
    get_org(connection, org)
    connection.execute(update(schema.orgs).where(schema.orgs.c.id == org).values(revoked_at=now))
    keys = schema.api_keys
    mine = (keys.c.org_id == org) & keys.c.revoked_at.is_(None)
    connection.execute(update(keys).where(mine).values(revoked_at=now))


# --- keys -------------------------------------------------------------------------------------------------


def key_id(sha256: str) -> str:
    return f"key-{sha256[:_ID_DIGITS]}"


def create_key(
    connection: Connection, *, org: str, name: str, role: Role, caps: Caps, now: float
) -> tuple[KeyRow, str]:
    """A new key and, this once, the key itself."""
    get_org(connection, org)
    if not _NAME.fullmatch(name) or name.strip() != name or name.startswith(MACHINE):
        raise InvalidInput(f"name = {name!r:.80}: must be 1 to 200 printable characters, not {MACHINE!r} at first")
    if any(key.name == name and key.revoked_at is None for key in list_keys(connection, org=org)):
        raise Conflict(f"{org} has a key named {name!r}", remedy="choose another name, or revoke that one")
    token = new_token()
    sha256 = fingerprint(token)
    connection.execute(
        insert(schema.api_keys).values(
            sha256=sha256,
            org_id=org,
            name=name,
            role=role.word,
            created_at=now,
            max_usd=caps.max_usd,
            max_runs=caps.max_runs,
            max_gpus=caps.max_gpus,
        )
    )
    return KeyRow(key_id(sha256), org, name, role, caps, now, None), token


def list_keys(connection: Connection, *, org: str | None = None) -> list[KeyRow]:
    """An org's keys, or everyone's, oldest first; revoked ones too."""
    keys = schema.api_keys
    query = select(keys).order_by(keys.c.org_id, keys.c.created_at, keys.c.sha256)
    if org is not None:
        query = query.where(keys.c.org_id == org)
    return [_key(row) for row in connection.execute(query)]


def revoke_key(connection: Connection, which: str, *, org: str | None, now: float) -> KeyRow:
    """Revokes the key of that id or, within one org, of that name; NotFound if none is in force."""
    found = [
        key
        for key in list_keys(connection, org=org)
        if key.revoked_at is None and (key.id == which or (org is not None and key.name == which))
    ]
    if not found:
        raise NotFound(f"no key {which!r:.80} in force", remedy="flash admin key list shows them")
    keys = schema.api_keys
    digits = found[0].id.removeprefix("key-")
    connection.execute(
        update(keys).where(keys.c.org_id == found[0].org, keys.c.sha256.startswith(digits)).values(revoked_at=now)
    )
    return found[0]


def any_key(connection: Connection) -> bool:
    """Whether somebody has a key: servers' own tokens do not count."""
    keys = schema.api_keys
    query = select(keys.c.sha256).where(keys.c.revoked_at.is_(None), keys.c.name.not_like(f"{MACHINE}%"))
    return connection.execute(query.limit(1)).first() is not None


def add_key(connection: Connection, *, org: str, token: str, name: str, role: Role = Role.OWNER) -> None:
    """Lets `token` act for `org`; adding the same token again changes nothing."""
    ensure_org(connection, org)
    if _find(connection, token) is None:
        values = {"sha256": fingerprint(token), "org_id": org, "name": name, "role": role.word}
        connection.execute(insert(schema.api_keys).values(created_at=time.time(), **values))


def revoke_keys(connection: Connection, *, org: str, name: str, keep: str | None = None) -> None:
    """Revokes every key of that name, except the token `keep`."""
    keys = schema.api_keys
    statement = update(keys).where(keys.c.org_id == org, keys.c.name == name, keys.c.revoked_at.is_(None))
    if keep is not None:
        statement = statement.where(keys.c.sha256 != fingerprint(keep))
    connection.execute(statement.values(revoked_at=time.time()))


def find_caller(connection: Connection, token: str) -> Caller | None:
    """Whose key that is; None for one that is not, or no longer, good."""
    row = _find(connection, token)
    return None if row is None or row.revoked_at is not None else _caller(_key(row))


def find_revoked(connection: Connection, token: str) -> Caller | None:
    """Whose key that was, for the audit log."""
    row = _find(connection, token)
    return None if row is None or row.revoked_at is None else _caller(_key(row))


def _find(connection: Connection, token: str) -> Any:
    keys = schema.api_keys
    sha256 = fingerprint(token)
    row = connection.execute(select(keys).where(keys.c.sha256 == sha256)).first()
    return row if row is not None and hmac.compare_digest(row.sha256, sha256) else None


def _caller(key: KeyRow) -> Caller:
    return Caller(org=key.org, role=key.role, key_id=key.id, name=key.name, caps=key.caps)


def _key(row: Any) -> KeyRow:
    caps = Caps(row.max_usd, row.max_runs, row.max_gpus)
    role = Role.named(row.role)
    return KeyRow(key_id(row.sha256), row.org_id, row.name, role, caps, row.created_at, row.revoked_at)
