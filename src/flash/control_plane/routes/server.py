"""The server about itself: health, who am I, stop."""

from __future__ import annotations

import os

from fastapi import APIRouter
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
    server: str


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


@router.get("/whoami")
def whoami(me: Me, plane: Plane) -> WhoAmI:
    return WhoAmI(org=me.org, role=me.role.word, server=plane.api_url)


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
