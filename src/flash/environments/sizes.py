"""How many rows a packaged split has and how long they are, without running or validating anything.

For estimates only: what a run reads, checks and refuses is `rows.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_MEASURED = 2000  # rows from the head of the file whose texts are measured
_MOST = 64 << 20  # bytes of a .json file, which must be read whole


@dataclass(frozen=True)
class SplitSize:
    """Mean characters of a row's prompt and of its target."""

    file: str
    rows: int
    input: float
    output: float


def split_size(folder: Path, params: Mapping[str, Any]) -> SplitSize | None:
    """Of the file that `params` (`split`, `dataset_path`) pick in a package; None where there is none to read."""
    path = _file_of(folder, params)
    if path is None:
        return None
    try:
        rows, texts = _lines(path) if path.suffix == ".jsonl" else _list(path)
    except (OSError, ValueError):
        return None
    if not rows:
        return None
    measured = [(_length(row.get("input")), _length(row.get("output"))) for row in texts if isinstance(row, dict)]
    count = max(len(measured), 1)
    name = path.relative_to(folder).as_posix()
    return SplitSize(name, rows, sum(a for a, _ in measured) / count, sum(b for _, b in measured) / count)


def _file_of(folder: Path, params: Mapping[str, Any]) -> Path | None:
    named = params.get("dataset_path")
    split = params.get("split", "train")
    if isinstance(named, str):
        wanted = [named]
    elif isinstance(split, str) and "/" not in split:
        wanted = [f"dataset/{split}.jsonl", f"dataset/{split}.json"]
    else:
        return None
    root = folder.resolve()
    for name in wanted:
        path = (root / name).resolve()
        if path.is_relative_to(root) and path.is_file() and path.suffix in (".jsonl", ".json"):
            return folder / path.relative_to(root)
    return None


def _lines(path: Path) -> tuple[int, list[Any]]:
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        head = [json.loads(line) for line in islice(lines, _MEASURED)]
        return len(head) + sum(1 for _ in lines), head


def _list(path: Path) -> tuple[int, Iterable[Any]]:
    if path.stat().st_size > _MOST:
        return 0, []
    rows = json.loads(path.read_bytes())
    return (len(rows), rows[:_MEASURED]) if isinstance(rows, list) else (0, [])


def _length(value: Any) -> int:
    """Characters of a text, or of what JSON makes of anything else."""
    if value is None:
        return 0
    return len(value) if isinstance(value, str) else len(json.dumps(value))
