"""The server about itself: health, readiness, who am I, stop."""

from __future__ import annotations

import os
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from flash import __version__
from flash.control_plane.auth import Me, Owner, Plane
from flash.control_plane.estimating import reachable
from flash.storage.database import SQLITE_VERSION

router = APIRouter(prefix="/api", tags=["server"])


class Health(BaseModel):
    status: str
    version: str
    pid: int
    sqlite_version: str


class WhoAmI(BaseModel):
    org: str
    role: str
    key: str  # its id
    name: str
    server: str


class Readiness(BaseModel):
    """`parts`: "ok", or what is wrong with it."""

    status: Literal["ready", "not ready"]
    parts: dict[str, str]


class ReachableDevice(BaseModel):
    device: str
    name: str
    kind: str
    memory_bytes: int
    usd_per_hour: float


class HardwareList(BaseModel):
    devices: list[ReachableDevice]


@router.get("/health")
def health() -> Health:
    return Health(status="ok", version=__version__, pid=os.getpid(), sqlite_version=SQLITE_VERSION)


@router.get("/ready", responses={503: {"model": Readiness, "description": "not now"}})
def ready(plane: Plane, response: Response) -> Readiness:
    """Whether requests are welcome here: for load balancers, without a key."""
    found = plane.readiness.parts()
    whole = all(words == "ok" for words in found.values())
    response.status_code = 200 if whole else 503
    return Readiness(status="ready" if whole else "not ready", parts=found)


@router.get("/whoami")
def whoami(me: Me, plane: Plane) -> WhoAmI:
    server = plane.settings.public_url or plane.api_url
    return WhoAmI(org=me.org, role=me.role.word, key=me.key_id, name=me.name, server=server)


@router.get("/hardware")
def hardware(me: Me, plane: Plane) -> HardwareList:
    """What runs can be placed on. An hour on one's own hardware has no price."""
    return HardwareList(
        devices=[
            ReachableDevice(
                device=name,
                name=found.name,
                kind=found.kind,
                memory_bytes=found.memory,
                usd_per_hour=found.usd_per_hour,
            )
            for name, found in reachable(plane)
        ]
    )


@router.post("/server/stop", status_code=202)
def stop(me: Owner, plane: Plane) -> dict[str, str]:
    plane.stopping.set()
    return {"status": "stopping"}
