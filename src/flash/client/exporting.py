"""An adapter, copied out of the server into a folder: every file checked against the manifest, or nothing.

Owns the reference's form and the atomic placing of the folder. Knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flash.client.client import FlashClient
from flash.errors import Conflict, InternalError, InvalidInput
from flash.records import Manifest, ManifestFile

PREFIX = "adapter/"
_REFERENCE = re.compile(r"(?P<run>[^/\s]+)(?:/step-(?P<step>\d+))?")


@dataclass(frozen=True)
class Exported:
    run_id: str
    step: int
    folder: Path
    files: tuple[str, ...]
    size: int  # bytes


def parse_reference(reference: str) -> tuple[str, int | None]:
    """`RUN_ID` or `RUN_ID/step-N` as (run id, step or None for the final adapter)."""
    match = _REFERENCE.fullmatch(reference.strip())
    if not match:
        raise InvalidInput(
            f"adapter {reference!r} is not RUN_ID or RUN_ID/step-N",
            remedy="flash checkpoints RUN_ID lists them",
        )
    return match["run"], int(match["step"]) if match["step"] is not None else None


def export_adapter(
    client: FlashClient, reference: str, output: Path, *, progress: Callable[[str], None] = lambda name: None
) -> Exported:
    """Copies the adapter's files into `output`, a folder that is new or empty.

    The files arrive in a folder beside it that takes its name only when every digest was right.
    """
    run_id, step = parse_reference(reference)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Conflict(f"{output} exists and is not an empty folder", remedy="choose another --output")
    manifest = client.adapter(run_id, step=step)
    output.parent.mkdir(parents=True, exist_ok=True)
    arriving = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        names = tuple(_fetch(client, manifest, file, step, arriving, progress) for file in manifest.files)
        arriving.chmod(0o755)
        if output.exists():
            output.rmdir()
        arriving.rename(output)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
    size = sum(file.size for file in manifest.files)
    return Exported(run_id=run_id, step=manifest.step, folder=output, files=names, size=size)


def _fetch(
    client: FlashClient,
    manifest: Manifest,
    file: ManifestFile,
    step: int | None,
    folder: Path,
    progress: Callable[[str], None],
) -> str:
    name = file.path.removeprefix(PREFIX)
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name:
        raise InternalError(f"{manifest.run_id}'s manifest names a file outside its folder: {file.path!r}")
    progress(name)
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as out:
        for chunk in client.adapter_file(manifest.run_id, file.path, step=step):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != file.sha256:
        raise InternalError(f"{name} of {manifest.run_id} arrived damaged", remedy="run the export again")
    return name
