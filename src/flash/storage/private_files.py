"""Small files that only their owner reads: a key, a token, an address.

Owns that they are whole or absent: each is written aside, to disk, and then put in its place.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """What was there before is gone."""
    _draft(path, content).rename(path)


def found_or_made(path: Path, content: bytes) -> bytes:
    """What is there, or `content`, put there: two starters at once go on with the same."""
    if not path.exists():
        draft = _draft(path, content)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes()


def _draft(path: Path, content: bytes) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    return draft
