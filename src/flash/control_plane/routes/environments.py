"""The environment hub: push, list, pull, delete."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from flash.artifacts.manifests import environment_key
from flash.control_plane.auth import Me, Plane
from flash.control_plane.services import Services
from flash.control_plane.submitting import put_archive
from flash.environments.package import inspect
from flash.errors import InvalidInput, PackageError
from flash.records import EnvironmentVersion
from flash.storage import environments
from flash.storage.identity import Caller

router = APIRouter(prefix="/api/environments", tags=["environments"])

_NAME = re.compile(r"[a-z0-9._-]{1,100}")

Part = Annotated[str, Path(max_length=200)]


class EnvironmentList(BaseModel):
    environments: list[EnvironmentVersion]


@router.post(
    "/{namespace}/{name}",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def push(namespace: Part, name: Part, request: Request, me: Me, plane: Plane) -> EnvironmentVersion:
    archive = await request.body()
    return await run_in_threadpool(_push, plane, me, namespace, name, archive)


def _push(plane: Services, me: Caller, namespace: str, name: str, archive: bytes) -> EnvironmentVersion:
    if namespace != me.org:
        raise InvalidInput(
            f"namespace = {namespace!r}: must be your own, {me.org!r}", remedy=f"push as {me.org}/{name}"
        )
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise InvalidInput(
            f"name = {name!r}: must be lower-case letters, digits, dots, dashes and underscores",
            remedy="`flash env push --name` makes it so",
        )
    files = inspect(archive)
    if "environment.py" not in files:
        raise PackageError("the archive has no environment.py at its root")
    sha256 = hashlib.sha256(archive).hexdigest()
    put_archive(plane, sha256, archive)
    with plane.database.write() as connection:
        version = environments.push(
            connection,
            org=me.org,
            namespace=namespace,
            name=name,
            sha256=sha256,
            size=len(archive),
            files=files,
            now=plane.clock(),
        )
    put_archive(plane, sha256, archive)
    return version


@router.get("")
def index(me: Me, plane: Plane) -> EnvironmentList:
    with plane.database.read() as connection:
        return EnvironmentList(environments=environments.current(connection, org=me.org))


@router.get("/{namespace}/{name}/archive", response_class=Response)
def pull(
    namespace: Part,
    name: Part,
    me: Me,
    plane: Plane,
    version: Annotated[str | None, Query(pattern="^[0-9a-fA-F]{4,64}$")] = None,
) -> Response:
    with plane.database.read() as connection:
        found = environments.resolve(connection, org=me.org, namespace=namespace, name=name, version=version)
    headers = {"ETag": f'"{found.sha256}"'}
    archive = plane.store.get_bytes(environment_key(found.sha256))
    return Response(archive, media_type="application/gzip", headers=headers)


@router.delete("/{namespace}/{name}", status_code=204)
def delete(namespace: Part, name: Part, me: Me, plane: Plane) -> None:
    with plane.database.write() as connection:
        environments.delete(connection, org=me.org, namespace=namespace, name=name, now=plane.clock())
