"""The dashboard: its pages, the one-time links into it, and the answers that only pages ask for.

Pages are files that need no key; all that they show comes from the API with the reader's own.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, Field

from flash.control_plane.auth import Bearer, Plane, Reader
from flash.control_plane.links import VALID_S
from flash.control_plane.routes import packages, planning, series
from flash.dashboard import site
from flash.errors import NotFound

router = APIRouter()
for routes in (series, packages, planning):
    router.include_router(routes.router)


class Link(BaseModel):
    code: str
    valid_s: float


class Code(BaseModel):
    code: str = Field(max_length=200)


class Key(BaseModel):
    key: str = Field(repr=False)


@router.post("/api/dashboard/links", status_code=201, tags=["pages"])
def make_link(me: Reader, token: Bearer, plane: Plane) -> Link:
    """A code that a browser can turn into the caller's key, once, soon."""
    return Link(code=plane.links.make(token), valid_s=VALID_S)


@router.post("/api/dashboard/session", tags=["pages"])
def enter(body: Code, plane: Plane, response: Response) -> Key:
    response.headers["Cache-Control"] = "no-store"
    return Key(key=plane.links.redeem(body.code))


@router.get("/", include_in_schema=False)
def root() -> Response:
    return RedirectResponse(site.ROOT)


@router.get(site.ROOT, include_in_schema=False)
@router.get(site.ROOT + "/{path:path}", include_in_schema=False)
def page(request: Request, path: str = "", if_none_match: Annotated[str | None, Header()] = None) -> Response:
    found = site.find(path)
    if found is None:
        raise NotFound(f"nothing is at {request.url.path!r:.200}")
    headers = {**site.HEADERS, "ETag": found.etag}
    if if_none_match == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
