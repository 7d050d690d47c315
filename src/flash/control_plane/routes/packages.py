"""Looking into environments: versions, files, rows with their problems, differences between versions.

Reads what was pushed and never runs it. An environment is named `namespace/name`, a version by (a prefix of) its
digest; versions that runs pinned are shown though their name was deleted since.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from flash.artifacts.manifests import environment_key
from flash.control_plane.auth import Me, Plane
from flash.control_plane.services import Services
from flash.control_plane.status import run_summary
from flash.environments.package import unpack
from flash.environments.rows import packaged_file, packaged_splits, read_file, reduce_row
from flash.errors import InvalidInput, NotFound
from flash.records import EnvironmentVersion, RunSummary
from flash.storage import views
from flash.storage.identity import Caller

router = APIRouter(prefix="/api/packages", tags=["pages"])

LARGEST_PACKAGE = 16 << 20  # bytes of an archive that a page opens
LARGEST_TEXT = 256 << 10  # bytes of a file that a page shows
LARGEST_DIFF = 4000  # lines
PROBLEMS = 50

Id = Annotated[str, Query(max_length=500, description="namespace/name")]
Version = Annotated[str | None, Query(pattern="^[0-9a-fA-F]{4,64}$")]


class VersionView(EnvironmentVersion):
    offered: bool  # a run may still be submitted with it
    runs: int


class VersionList(BaseModel):
    versions: list[VersionView]
    runs: list[RunSummary]  # the newest, on any version


@router.get("/versions")
def versions(environment: Id, me: Me, plane: Plane) -> VersionList:
    """Every version of an environment, the current one first, and the runs on them."""
    namespace, name = _split(environment)
    with plane.database.read() as connection:
        found = views.versions(connection, org=me.org, namespace=namespace, name=name)
        runs = views.runs_of(connection, org=me.org, namespace=namespace, name=name, limit=100)
    return VersionList(
        versions=[
            VersionView(**use.version.model_dump(), offered=use.offered, runs=use.runs) for use in found
        ],
        runs=[run_summary(run) for run in runs],
    )


class FileView(BaseModel):
    path: str
    size: int


class FileList(BaseModel):
    version: EnvironmentVersion
    files: list[FileView]
    splits: list[str]


@router.get("/files")
def files(environment: Id, me: Me, plane: Plane, version: Version = None) -> FileList:
    found = _find(plane, me, environment, version)
    with _unpacked(plane, found) as folder:
        listed = [FileView(path=name, size=(folder / name).stat().st_size) for name in sorted(found.files)]
        return FileList(version=found, files=listed, splits=list(packaged_splits(folder)))


class FileText(BaseModel):
    path: str
    size: int
    text: str | None  # None: not text
    truncated: bool


@router.get("/file")
def file(
    environment: Id, path: Annotated[str, Query(max_length=1000)], me: Me, plane: Plane, version: Version = None
) -> FileText:
    found = _find(plane, me, environment, version)
    if path not in found.files:
        raise NotFound(f"{environment} has no file {path!r:.200}", remedy=f"it has: {', '.join(found.files)[:300]}")
    with _unpacked(plane, found) as folder:
        size = (folder / path).stat().st_size
        with (folder / path).open("rb") as opened:
            head = opened.read(LARGEST_TEXT)
    text = None if b"\0" in head else head.decode("utf-8", "replace")
    return FileText(path=path, size=size, text=text, truncated=size > len(head))


class RowView(BaseModel):
    place: str
    row: dict[str, Any] | None
    problem: str | None


class RowPage(BaseModel):
    split: str
    rows: list[RowView]
    count: int
    problems: list[str]
    dropped: dict[str, int]  # keys that no run sees, and in how many rows


@router.get("/rows")
def rows(
    environment: Id,
    me: Me,
    plane: Plane,
    split: Annotated[str, Query(max_length=200)] = "train",
    version: Version = None,
    offset: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 25,
) -> RowPage:
    """One page of a packaged split, and what a run would refuse of the whole of it."""
    found = _find(plane, me, environment, version)
    with _unpacked(plane, found) as folder:
        path = packaged_file(folder, split)
        if path is None:
            raise NotFound(
                f"{environment} packages no split {split!r:.100}",
                remedy=f"it has: {', '.join(packaged_splits(folder)) or 'none; its rows are made in code'}",
            )
        return _rows(path, path.relative_to(folder).as_posix(), split, offset, limit)


def _rows(path: Path, label: str, split: str, offset: int, limit: int) -> RowPage:
    shown: list[RowView] = []
    problems: list[str] = []
    dropped: dict[str, int] = {}
    seen: dict[str, str] = {}
    count = 0
    try:
        for place, record in read_file(path, label):
            problem = None
            try:
                row = reduce_row(record, place, dropped)
            except InvalidInput as error:
                row, problem = record, error.message
            else:
                question = json.dumps(row["input"], sort_keys=True, default=str)
                first = seen.setdefault(question, place)
                if first != place:
                    problem = f"{place}: the same input as {first}"
            if problem and len(problems) < PROBLEMS:
                problems.append(problem)
            if offset <= count < offset + limit:
                shown.append(RowView(place=place, row=json.loads(json.dumps(row, default=str)), problem=problem))
            count += 1
    except InvalidInput as error:  # a line that can't be read at all: a run stops there too
        problems.insert(0, error.message)
        if offset <= count < offset + limit:
            shown.append(RowView(place=f"row {count + 1}", row=None, problem=error.message))
    return RowPage(split=split, rows=shown, count=count, problems=problems, dropped=dropped)


class FileDiff(BaseModel):
    path: str
    change: str  # added | removed | changed
    lines: list[str]  # unified; empty where a file is not text
    truncated: bool = False


class Diff(BaseModel):
    before: EnvironmentVersion
    after: EnvironmentVersion
    files: list[FileDiff]
    same: int  # files that did not change


@router.get("/diff")
def diff(
    me: Me,
    plane: Plane,
    before: Annotated[str, Query(max_length=600, description="namespace/name@version")],
    after: Annotated[str, Query(max_length=600, description="namespace/name@version")],
) -> Diff:
    """What changed from one version to another, file by file."""
    old, new = (_find(plane, me, *_at_version(each)) for each in (before, after))
    with _unpacked(plane, old) as old_folder, _unpacked(plane, new) as new_folder:
        changes = [
            change
            for path in sorted({*old.files, *new.files})
            if (change := _file_diff(path, old_folder / path, new_folder / path)) is not None
        ]
    return Diff(before=old, after=new, files=changes, same=len({*old.files, *new.files}) - len(changes))


def _file_diff(path: str, old: Path, new: Path) -> FileDiff | None:
    before = old.read_bytes() if old.is_file() else None
    after = new.read_bytes() if new.is_file() else None
    if before == after:
        return None
    change = "added" if before is None else "removed" if after is None else "changed"
    both = (before or b"", after or b"")
    if any(b"\0" in each for each in both):
        return FileDiff(path=path, change=change, lines=[])
    texts = [each[:LARGEST_TEXT].decode("utf-8", "replace").splitlines() for each in both]
    cut = any(len(each) > LARGEST_TEXT for each in both)
    lines = list(difflib.unified_diff(texts[0], texts[1], path, path, lineterm=""))
    return FileDiff(path=path, change=change, lines=lines[:LARGEST_DIFF], truncated=cut or len(lines) > LARGEST_DIFF)


def _split(environment: str) -> tuple[str, str]:
    namespace, slash, name = environment.partition("/")
    if not (slash and namespace and name):
        raise InvalidInput(f"environment = {environment!r:.200}: must be namespace/name")
    return namespace, name


def _at_version(text: str) -> tuple[str, str | None]:
    """`namespace/name@prefix`; a name that was fetched from GitHub has an @ of its own before that one."""
    environment, at, version = text.rpartition("@")
    digits = set("0123456789abcdefABCDEF")
    if at and 4 <= len(version) <= 64 and set(version) <= digits:
        return environment, version
    return text, None


def _find(plane: Services, me: Caller, environment: str, version: str | None) -> EnvironmentVersion:
    """The version that was asked for; without one, the current."""
    namespace, name = _split(environment)
    with plane.database.read() as connection:
        known = views.versions(connection, org=me.org, namespace=namespace, name=name)
    fitting = [use.version for use in known if version is None or use.version.sha256.startswith(version.lower())]
    if not fitting:
        raise NotFound(f"{environment} has no version {version}", remedy="leave the version out for the newest")
    if version is not None and len(fitting) > 1:
        raise InvalidInput(f"{environment}@{version} fits {len(fitting)} versions", remedy="write more digits")
    return fitting[0]


@contextmanager
def _unpacked(plane: Services, version: EnvironmentVersion) -> Iterator[Path]:
    """The version's files, in a folder for as long as the block lasts."""
    if version.size > LARGEST_PACKAGE:
        raise InvalidInput(
            f"{version.id} has {version.size:,} bytes: more than a page opens",
            remedy=f"`flash env pull {version.id}` brings it to you",
        )
    archive = plane.store.get_bytes(environment_key(version.sha256))
    with tempfile.TemporaryDirectory(prefix="flash-package-") as folder:
        unpack(archive, Path(folder))
        yield Path(folder)
