"""Who calls: organisations and API keys. A key is kept as its SHA-256 only and can't be read back."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from flash.storage import schema

LOCAL_ORG = "local"
KEY_PREFIX = "fslo_"
ATTEMPT_PREFIX = "fslw_"


@dataclass(frozen=True)
class Caller:
    org: str
    role: str


def new_token(prefix: str = KEY_PREFIX) -> str:
    """256 random bits behind a prefix that scanners can recognise."""
    return prefix + secrets.token_urlsafe(32)


def fingerprint(token: str) -> str:
    """SHA-256 in hex. Tokens are random, so a plain hash is enough: there is nothing to guess."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def matches(token: str, sha256: str) -> bool:
    return hmac.compare_digest(fingerprint(token), sha256)


def ensure_org(connection: Connection, org: str) -> None:
    if connection.execute(select(schema.orgs.c.id).where(schema.orgs.c.id == org)).first() is None:
        connection.execute(insert(schema.orgs).values(id=org, created_at=time.time()))


def add_key(connection: Connection, *, org: str, token: str, name: str, role: str = "owner") -> None:
    """Lets `token` act for `org`; adding the same token again changes nothing."""
    ensure_org(connection, org)
    sha256 = fingerprint(token)
    keys = schema.api_keys
    if connection.execute(select(keys.c.sha256).where(keys.c.sha256 == sha256)).first() is None:
        values = {"sha256": sha256, "org_id": org, "name": name, "role": role, "created_at": time.time()}
        connection.execute(insert(keys).values(**values))


def revoke_keys(connection: Connection, *, org: str, name: str, keep: str | None = None) -> None:
    """Revokes every key of that name, except the token `keep`."""
    keys = schema.api_keys
    statement = update(keys).where(keys.c.org_id == org, keys.c.name == name, keys.c.revoked_at.is_(None))
    if keep is not None:
        statement = statement.where(keys.c.sha256 != fingerprint(keep))
    connection.execute(statement.values(revoked_at=time.time()))


def find_caller(connection: Connection, token: str) -> Caller | None:
    keys = schema.api_keys
    sha256 = fingerprint(token)
    row = connection.execute(select(keys).where(keys.c.sha256 == sha256, keys.c.revoked_at.is_(None))).first()
    if row is None or not hmac.compare_digest(row.sha256, sha256):
        return None
    return Caller(org=row.org_id, role=row.role)
