"""Orgs, keys and the audit log over HTTP: for admins within their org, for the server's owner everywhere."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel

from flash.control_plane.administering import Administration
from flash.control_plane.auth import Admin, Owner, Plane
from flash.control_plane.services import Services
from flash.records import AuditEntry, Key, KeyRequest, NewKey, Org, OrgRequest, ShareRequest
from flash.storage.identity import Caller

router = APIRouter(prefix="/api", tags=["admin"])

OrgName = Annotated[str | None, Query(max_length=200)]
Part = Annotated[str, Path(max_length=200)]


class OrgList(BaseModel):
    orgs: list[Org]


class KeyList(BaseModel):
    keys: list[Key]


class AuditPage(BaseModel):
    entries: list[AuditEntry]


def _for(plane: Services, me: Caller) -> Administration:
    return Administration(plane.database, me, plane.clock)


@router.post("/orgs", status_code=201)
def create_org(body: OrgRequest, request: Request, me: Owner, plane: Plane) -> Org:
    made = _for(plane, me).create_org(body.name)
    request.state.object = f"org={made.name}"
    return made


@router.get("/orgs")
def list_orgs(me: Owner, plane: Plane) -> OrgList:
    return OrgList(orgs=_for(plane, me).orgs())


@router.delete("/orgs/{org}")
def revoke_org(org: Part, me: Owner, plane: Plane) -> Org:
    """Revokes its keys and cancels its runs; what it has stays."""
    revoked = _for(plane, me).revoke_org(org)
    plane.wake.set()
    return revoked


@router.patch("/orgs/{org}")
def set_share(org: Part, body: ShareRequest, request: Request, me: Owner, plane: Plane) -> Org:
    """The org's weight among the others where devices are scarce."""
    request.state.object = f"org={org} share={body.share:g}"
    changed = _for(plane, me).set_share(org, body.share)
    plane.wake.set()
    return changed


@router.post("/keys", status_code=201)
def create_key(body: KeyRequest, request: Request, response: Response, me: Admin, plane: Plane) -> NewKey:
    """The answer has the key itself, this once."""
    made = _for(plane, me).create_key(body)
    request.state.object = f"key={made.key.id} org={made.key.org} role={made.key.role}"
    response.headers["Cache-Control"] = "no-store"
    return made


@router.get("/keys")
def list_keys(me: Admin, plane: Plane, org: OrgName = None) -> KeyList:
    return KeyList(keys=_for(plane, me).keys(org))


@router.delete("/keys/{key}")
def revoke_key(key: Part, me: Admin, plane: Plane, org: OrgName = None) -> Key:
    """By its id, or within an org by its name."""
    return _for(plane, me).revoke_key(key, org)


@router.get("/audit")
def audit(
    me: Admin,
    plane: Plane,
    org: OrgName = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**53)] = None,
) -> AuditPage:
    """Newest first; `before` is the id of the last entry of the page before."""
    return AuditPage(entries=_for(plane, me).audit(org, limit, before))
