"""Large datasets' token rows, kept from one run to the next: what a million rows cost is paid once.

Owns the folder of kept rows: what names an entry, how one is written whole or not at all, and which leave when it
grows too large. An entry is named by everything that its tokens depend on; an environment with secrets may read what
no digest knows of, so its rows are never kept. Knows nothing of how rows are rendered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flash.config.run import RunSpec
from flash.inference.chat import ChatRenderer
from flash.training.batches import TokenRows

LEAST_ROWS = 1_000  # fewer are rendered about as fast as they are found
MOST_BYTES = 8 * 2**30  # of all entries; the newest one stays whatever its size
_FORMAT = 2  # of entries, and of what rendering makes of a row


class PreparedRows:
    """Kept rows in `folder`, shared by all runs of a machine; for the rows of one run. None keeps nothing."""

    def __init__(self, folder: Path | None, spec: RunSpec, renderer: ChatRenderer, environment_digest: str) -> None:
        self._entry: Path | None = None
        if folder is not None and environment_digest and not spec.environment.secrets:
            self._entry = folder / _name(spec, renderer, environment_digest)

    def find(self) -> tuple[TokenRows, dict[str, Any]] | None:
        """The rows and what was told of them, if they are kept; a damaged entry is as good as none."""
        if self._entry is None:
            return None
        try:
            told = json.loads((self._entry / "told.json").read_text(encoding="utf-8"))
            rows = TokenRows(self._entry / "rows")
            os.utime(self._entry)
        except (OSError, ValueError):
            return None
        return rows, told

    def keep(self, rows: TokenRows, told: Mapping[str, Any]) -> None:
        """Keeps the rows if they are many; a disk that takes them not costs the next run its head start only."""
        if self._entry is None or len(rows) < LEAST_ROWS:
            return
        folder = self._entry.parent
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            arriving = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            try:
                rows.save(arriving / "rows")
                (arriving / "told.json").write_text(json.dumps(told), encoding="utf-8")
                shutil.rmtree(self._entry, ignore_errors=True)
                arriving.rename(self._entry)
            finally:
                shutil.rmtree(arriving, ignore_errors=True)
            _make_room(folder, spared=self._entry)


def _name(spec: RunSpec, renderer: ChatRenderer, environment_digest: str) -> str:
    tokenizer: Any = renderer.tokenizer
    parts = [
        _FORMAT,
        environment_digest,
        spec.environment.model_dump(mode="json"),
        spec.worker_env,
        [spec.train.max_examples, spec.train.max_length, spec.thinking],
        [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _make_room(folder: Path, *, spared: Path) -> None:
    """Drops the entries unused for longest. Rows that a run has mapped stay readable to it."""
    entries = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime)
    sizes = {entry: sum(file.stat().st_size for file in entry.rglob("*") if file.is_file()) for entry in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total > MOST_BYTES and entry != spared:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]
