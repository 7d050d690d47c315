"""Checkpoints in the store: content-addressed objects, then one manifest that makes them a checkpoint.

Owns the layout `runs/<run-id>/objects/<sha256>` and `runs/<run-id>/checkpoints/step-<N>.json`, the order of
writing, and the checks of reading. Knows no database: whoever records a manifest verifies it first.

A large file is several objects, its parts, each by its own digest. That makes an upload resumable on every kind of
store, by whoever comes next: what broke off goes on with the parts that are missing, be it the same worker or the
one that follows it and has made the same bytes again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from flash.artifacts.store import Objects, Store, sync_folder
from flash.errors import Conflict, InvalidInput, NotFound, Unavailable
from flash.failpoints import failpoint
from flash.records import Manifest, ManifestFile, ManifestPart

_CHUNK = 4 << 20  # bytes
Part = Literal["adapter", "state"]
PART_BYTES = 64 << 20  # of a large file in one object: what is sent again, at most, when a connection breaks


class Damaged(Unavailable):
    """A checkpoint in the store is not as it was recorded, though the store itself answers."""

    code = "damaged"


def object_key(run_id: str, sha256: str) -> str:
    return f"runs/{run_id}/objects/{sha256}"


def manifest_key(run_id: str, step: int) -> str:
    return f"runs/{run_id}/checkpoints/step-{step}.json"


def environment_key(sha256: str) -> str:
    return f"environments/{sha256}.tar.gz"


def write_checkpoint(
    store: Objects,
    run_id: str,
    step: int,
    folder: Path,
    final: bool,
    metrics: Mapping[str, float],
    *,
    part_bytes: int = PART_BYTES,
) -> tuple[Manifest, str]:
    """Uploads a checkpoint folder and returns its manifest and the SHA-256 of the manifest's bytes.

    Objects go first, those that are there already are skipped, and the manifest goes last, only if the step has
    none yet. A step that was written before (by an attempt that died before it could say so) keeps its first
    manifest if everything that names is in the store; a damaged one is replaced.
    """
    files: list[ManifestFile] = []
    for path in sorted(found for found in folder.rglob("*") if found.is_file()):
        file = _describe(path, path.relative_to(folder).as_posix(), part_bytes)
        _put_missing(store, run_id, path, file)
        files.append(file)
    if not files:
        raise InvalidInput(f"{folder} holds no files: there is no checkpoint to upload")
    manifest = Manifest(
        run_id=run_id,
        step=step,
        final=final,
        created_at=time.time(),
        files=tuple(files),
        metrics=dict(metrics),
    )
    body = _encode(manifest)
    key = manifest_key(run_id, step)
    failpoint("upload.objects")
    try:
        store.put_bytes(key, body, create=True)
    except Conflict:
        try:
            earlier, sha256 = read_manifest(store, run_id, step)
            verify(store, earlier)
        except (Damaged, NotFound):
            store.put_bytes(key, body)
        else:
            if earlier.final or not final:
                return earlier, sha256
            # The same step, now known to be the last: the promotion must be visible.
            store.put_bytes(key, body)
    failpoint("upload.manifest")
    return manifest, hashlib.sha256(body).hexdigest()


def _describe(path: Path, name: str, part_bytes: int) -> ManifestFile:
    """A local file as a manifest has it, read once."""
    whole, parts = hashlib.sha256(), []
    with path.open("rb") as source:
        while True:
            part, size = hashlib.sha256(), 0
            while chunk := source.read(min(_CHUNK, part_bytes - size)):
                part.update(chunk)
                whole.update(chunk)
                size += len(chunk)
            if not size:
                break
            parts.append(ManifestPart(sha256=part.hexdigest(), size=size))
    total = sum(part.size for part in parts)
    return ManifestFile(path=name, sha256=whole.hexdigest(), size=total, parts=tuple(parts) if len(parts) > 1 else ())


def _put_missing(store: Objects, run_id: str, path: Path, file: ManifestFile) -> None:
    """Uploads those of a file's objects that the store does not have."""
    start = 0
    for part in file.objects:
        key = object_key(run_id, part.sha256)
        if store.size(key) != part.size:
            if file.parts:
                with path.open("rb") as source:
                    source.seek(start)
                    store.put_bytes(key, source.read(part.size))
            else:
                store.put_file(key, path)
            failpoint("upload.object")
        start += part.size


def read_manifest(store: Objects, run_id: str, step: int) -> tuple[Manifest, str]:
    """The manifest and the SHA-256 of its bytes; `NotFound` if the step is not complete."""
    body = store.get_bytes(manifest_key(run_id, step))
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        raise Damaged(f"the manifest of {run_id}/step-{step} is damaged") from error
    if (manifest.run_id, manifest.step) != (run_id, step):
        raise Damaged(f"the manifest of {run_id}/step-{step} names {manifest.run_id}/step-{manifest.step}")
    return manifest, hashlib.sha256(body).hexdigest()


def verify(store: Objects, manifest: Manifest, *, only: Part | None = None, digests: bool = False) -> None:
    """Checks that every object is there with its size and, with `digests`, its bytes; else `Damaged`."""
    for file in _files(manifest, only):
        if sum(part.size for part in file.objects) != file.size:
            raise Damaged(f"{manifest.run_id}/step-{manifest.step}: {file.path} is not as long as its parts together")
        for number, part in enumerate(file.objects, 1):
            of = f"{file.path}, part {number} of {len(file.parts)}," if file.parts else file.path
            key = object_key(manifest.run_id, part.sha256)
            size = store.size(key)
            if size != part.size:
                have = "is missing" if size is None else f"has {size} bytes, not {part.size}"
                raise Damaged(f"{manifest.run_id}/step-{manifest.step}: {of} {have}")
            if digests and store.digest(key) != part.sha256:
                raise Damaged(f"{manifest.run_id}/step-{manifest.step}: {of} has other bytes than recorded")


def fetch_checkpoint(store: Objects, manifest: Manifest, folder: Path, only: Part | None = None) -> None:
    """Downloads a checkpoint into `folder`, which appears only when it is complete and every digest fits.

    `only="adapter"` leaves the optimizer's and generators' state out. An existing `folder` is replaced.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        for file in _files(manifest, only):
            target = draft / _inside(file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as output:
                for chunk in stream_file(store, manifest, file):
                    output.write(chunk)
                output.flush()
                os.fsync(output.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def stream_file(store: Objects, manifest: Manifest, file: ManifestFile) -> Iterator[bytes]:
    """The file's bytes in chunks; raises `Damaged` at the end if they are not those that were recorded."""
    found = hashlib.sha256()
    for part in file.objects:
        for chunk in store.stream(object_key(manifest.run_id, part.sha256)):
            found.update(chunk)
            yield chunk
    if found.hexdigest() != file.sha256:
        raise Damaged(f"{manifest.run_id}/step-{manifest.step}: {file.path} has other bytes than recorded")


def copy_checkpoint(store: Store, manifest: Manifest, run_id: str) -> tuple[Manifest, str]:
    """Gives another run a checkpoint of its own with the same files; returns its manifest and that one's SHA-256."""
    for sha256 in object_digests(manifest):
        store.copy(object_key(manifest.run_id, sha256), object_key(run_id, sha256))
    copied = manifest.model_copy(update={"run_id": run_id, "created_at": time.time()})
    body = _encode(copied)
    store.put_bytes(manifest_key(run_id, copied.step), body)  # nobody else writes to a run that is only being made
    return copied, hashlib.sha256(body).hexdigest()


def adapter_only(manifest: Manifest) -> Manifest:
    """The same checkpoint without its optimizer and generator state."""
    return manifest.model_copy(update={"files": tuple(_files(manifest, "adapter"))})


def remove_checkpoint(store: Store, manifest: Manifest, keep: list[Manifest]) -> None:
    """Removes a checkpoint, manifest first, and the objects that none of `keep` shares."""
    store.delete(manifest_key(manifest.run_id, manifest.step))
    kept: set[str] = set().union(*(object_digests(other) for other in keep))
    for sha256 in object_digests(manifest) - kept:
        store.delete(object_key(manifest.run_id, sha256))


def remove_state(store: Store, manifest: Manifest, keep: list[Manifest]) -> None:
    """Removes a checkpoint's optimizer and generator state; its adapter stays."""
    kept = object_digests(manifest, "adapter").union(*(object_digests(other) for other in keep))
    for sha256 in object_digests(manifest, "state") - kept:
        store.delete(object_key(manifest.run_id, sha256))


def object_digests(manifest: Manifest, only: Part | None = None) -> set[str]:
    """The objects that a checkpoint, or one part of it, consists of."""
    return {part.sha256 for file in _files(manifest, only) for part in file.objects}


def _files(manifest: Manifest, only: Part | None) -> list[ManifestFile]:
    return [file for file in manifest.files if only is None or file.path.startswith(f"{only}/")]


def _inside(path: str) -> str:
    """A manifest's path, which may only lead below the folder it is fetched into."""
    if path.startswith("/") or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in path.split("/")):
        raise Damaged(f"a manifest names the path {path!r:.200}, which leads outside its folder")
    return path


def _encode(manifest: Manifest) -> bytes:
    return json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1).encode()
