"""Which file answers which address, and under which rules a browser may use it.

Owns the pages' address space and their security headers. Knows nothing of the API, keys or runs: every address that
names no file is the one page, which draws what the address says. Files are read when first asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = "/dashboard"
STATIC = Path(__file__).parent / "static"
PAGE = "index.html"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Scripts and styles from these files only, requests to this server only, no framing, no addresses given away: what a
# reward, a prompt or a log says can't become more than text even if a page had a hole.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, answered with 304 while the same
}


@dataclass(frozen=True)
class File:
    content: bytes
    media_type: str
    etag: str


def find(path: str) -> File | None:
    """The file at an address below `ROOT`: one of `static/`, or the page; None for a file that is not there."""
    folder, _, name = path.partition("/")
    return _files().get(name) if folder == "static" else _files()[PAGE]


@cache
def _files() -> dict[str, File]:
    found = {}
    for path in sorted(STATIC.rglob("*")):
        if path.is_file() and path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(STATIC).as_posix()] = File(content, MEDIA_TYPES[path.suffix], etag)
    return found
