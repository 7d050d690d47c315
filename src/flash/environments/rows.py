"""Rows: where a split's examples come from, and what a row must be.

Reads packaged files and rows built in code, reduces each to `input`/`output`/`metadata`, and writes a split to
one file of JSON lines with the byte offset of each row, so that memory stays flat whatever a split's size.
Knows nothing of prompts, rewards or processes.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from freesolo.datasets.records import load_records, stable_example_id
from freesolo.datasets.types import TaskExample
from freesolo.utils.core import json_safe_value, serialize_value

from flash.errors import InvalidInput

DATASET_FOLDER = "dataset"
DEFAULT_SPLIT = "train"
PACKAGED_SUFFIXES = (".jsonl", ".json")  # in the order in which they are looked for
DATASET_PATH_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".bson")
KEPT_KEYS = ("input", "output", "metadata")

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """A split on disk: `offsets[i]` is where row i starts; `dropped` counts what reduction left out, by key."""

    path: Path
    offsets: array[int]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.offsets)

    def read(self, indices: Iterable[int]) -> Iterator[Row]:
        """The rows at these indices, in their order."""
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self.offsets[index])
                yield json.loads(file.readline())


def packaged_splits(folder: Path) -> tuple[str, ...]:
    """Names of the splits that the package ships as files, `train` first."""
    names = {
        path.stem
        for path in (folder / DATASET_FOLDER).glob("*")
        if path.suffix in PACKAGED_SUFFIXES and path.is_file() and not path.name.startswith(".")
    }
    return tuple(sorted(names, key=lambda name: (name != DEFAULT_SPLIT, name)))


def packaged_file(folder: Path, split: str) -> Path | None:
    """`dataset/<split>.jsonl`, else `.json`, else None. A split is a plain name, never a path."""
    if not split or split in (".", "..") or "/" in split or "\\" in split or "\0" in split:
        raise InvalidInput(f"split = {split!r}: a split is the name of a file in {DATASET_FOLDER}/, without folders")
    for suffix in PACKAGED_SUFFIXES:
        path = folder / DATASET_FOLDER / f"{split}{suffix}"
        if path.is_file():
            return path
    return None


def missing_split(folder: Path, split: str) -> InvalidInput:
    """The error for a split that was asked for and is not there."""
    shipped = packaged_splits(folder)
    return InvalidInput(
        f"split {split!r} is missing: the package has no {DATASET_FOLDER}/{split}.jsonl or {split}.json",
        remedy=f"it has: {', '.join(shipped)}" if shipped else f"its {DATASET_FOLDER}/ folder has no split at all",
    )


# --- reading ----------------------------------------------------------------------------------------


def read_file(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    """(place, record) of each row of a data file; `label` is how people know the file. Blank lines don't count."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _read_jsonl(path, label)
    elif suffix == ".json":
        yield from _read_json(path, label)
    elif suffix == ".csv":
        yield from _read_csv(path, label)
    elif suffix == ".txt":
        for number, text in _lines(path, label):
            yield f"{label} line {number}", {"input": text.strip()}
    elif suffix == ".bson":
        yield from _read_bson(path, label)
    else:
        raise InvalidInput(
            f"{label}: rows can't be read from {suffix or 'a file without suffix'}; "
            f"use one of {', '.join(DATASET_PATH_SUFFIXES)}"
        )


def _lines(path: Path, label: str) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{label} line {number}: not UTF-8 text ({error.reason})") from None
            if text.strip():
                yield number, text


def _read_jsonl(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    for number, text in _lines(path, label):
        place = f"{label} line {number}"
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise InvalidInput(f"{place}: not JSON ({reason}); each line is one object") from None
        yield place, _as_record(value, place)


def _read_json(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{label} line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{label}: not UTF-8 text ({error.reason})") from None
    except RecursionError:
        raise InvalidInput(f"{label}: not JSON (nested too deeply)") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise InvalidInput(f"{label}: holds {_kind(value)}; it must be an array of objects")
    for number, item in enumerate(value, start=1):
        place = f"{label} item {number}"
        yield place, _as_record(item, place)


def _read_csv(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                record.pop(None, None)  # cells beyond the header
                yield f"{label} line {reader.line_num}", dict(record)
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{label}: not UTF-8 text ({error.reason})") from None
        except csv.Error as error:
            raise InvalidInput(f"{label} line {reader.line_num}: not CSV ({error})") from None


def _read_bson(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    try:
        records = load_records(path)
    except Exception as error:
        raise InvalidInput(f"{label}: {type(error).__name__}: {error}") from None
    for number, record in enumerate(records, start=1):
        yield f"{label} item {number}", record


def _as_record(value: object, place: str) -> Row:
    if isinstance(value, str):
        return {"input": value}
    if not isinstance(value, dict):
        raise InvalidInput(f"{place}: holds {_kind(value)}; each row must be an object with an `input`")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# --- rows built in code -----------------------------------------------------------------------------


def rows_in_code(dataset: object) -> list[TaskExample] | None:
    """`env.dataset` as examples, reduced like any other row; None when the environment builds no rows.

    Takes what the SDK's loaders take: examples, records, a `Dataset`. (A path is the caller's to resolve.)
    """
    if dataset is None:
        return None
    items = getattr(dataset, "examples", dataset)
    if isinstance(items, Mapping | str | bytes) or not isinstance(items, Iterable):
        raise InvalidInput(
            f"env.dataset is {type(dataset).__name__}: it must be a list of TaskExample or of records with `input`"
        )
    return [_example_from_code(item, index) for index, item in enumerate(items)]


def _example_from_code(item: object, index: int) -> TaskExample:
    place = f"env.dataset[{index}]"
    if isinstance(item, TaskExample):
        record = {**item.record} if isinstance(item.record, dict) else {}
        record.setdefault("input", item.input)
        refuse_image(record, place)
        return TaskExample(
            record={key: record[key] for key in KEPT_KEYS if key in record},
            input=item.input,
            id=stable_example_id(index),
            metadata=item.metadata,
            output=item.output,
        )
    row = reduce_row(_as_record(item, place), place, {})
    return example_from_row(row, index)


def code_row(example: TaskExample) -> Row:
    """An example as the row that is written beside those from files."""
    row: Row = {"input": example.input}
    if example.output is not None:
        row["output"] = json_safe_value(example.output)
    if example.metadata:
        row["metadata"] = json_safe_value(example.metadata)
    return row


# --- what a row must be -----------------------------------------------------------------------------


def reduce_row(record: Mapping[str, Any], place: str, dropped: dict[str, int]) -> Row:
    """A record's input, output and metadata; every other key is counted in `dropped`."""
    if record.get("input") is None:
        raise InvalidInput(f"{place}: no `input`", remedy="every row needs one")
    refuse_image(record, place)
    row: Row = {"input": record["input"]}
    if record.get("output") is not None:
        row["output"] = record["output"]
    metadata = record.get("metadata")
    if isinstance(metadata, dict):
        row["metadata"] = metadata
    elif metadata not in (None, ""):
        dropped["metadata (not an object)"] = dropped.get("metadata (not an object)", 0) + 1
    for key in record:
        if key not in KEPT_KEYS:
            dropped[str(key)] = dropped.get(str(key), 0) + 1
    return row


_IMAGE_KEYS = frozenset(("image", "images", "image_url", "image_urls"))
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp")


def refuse_image(record: Mapping[str, Any], place: str) -> None:
    """Raises for a row with an image. A key called `image` alone is no proof: it may name a container."""
    named = any(_looks_like_image(record[key]) for key in _IMAGE_KEYS & record.keys())
    if named or has_image_part(record.get("input")) or has_image_part(record.get("output")):
        raise InvalidInput(f"{place}: has an image, and models are trained on text only for now")


def _looks_like_image(value: object) -> bool:
    if isinstance(value, list):
        return any(_looks_like_image(item) for item in value)
    if isinstance(value, dict):
        return bool({"url", "bytes", "path", "image_url"} & value.keys())
    if isinstance(value, str):
        text = value.lower()
        return text.startswith("data:image/") or text.split("?")[0].endswith(_IMAGE_ENDINGS)
    return isinstance(value, bytes)


def has_image_part(value: object) -> bool:
    """True when a value, at any depth, holds a chat content part with an image."""
    if isinstance(value, dict):
        return value.get("type") in _IMAGE_PARTS or any(has_image_part(item) for item in value.values())
    if isinstance(value, list):
        return any(has_image_part(item) for item in value)
    return isinstance(value, str) and value[:16].lower().startswith("data:image/")


def example_from_row(row: Row, index: int) -> TaskExample:
    """The SDK's view of a reduced row: objects as input become text as the SDK writes them."""
    return TaskExample(
        record=row,
        input=serialize_value(row["input"]),
        id=stable_example_id(index),
        metadata=row.get("metadata") or {},
        output=row.get("output"),
    )


# --- writing ----------------------------------------------------------------------------------------


_encode = json.JSONEncoder(ensure_ascii=False, default=json_safe_value).encode


def write_rows(
    records: Iterable[tuple[str, Row]],
    target: Path,
    *,
    limit: int = 0,
    reduce: Callable[[Row, str, dict[str, int]], Row] = reduce_row,
) -> RowFile:
    """Reduces records and writes them to `target`, whole or not at all; `limit` keeps the head (0 = all)."""
    offsets: array[int] = array("Q")
    dropped: dict[str, int] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            position = 0
            for place, record in islice(records, limit or None):
                row = reduce(record, place, dropped)
                line = _encode(row).encode("utf-8", "replace")
                file.write(line + b"\n")
                offsets.append(position)
                position += len(line) + 1
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return RowFile(target, offsets, dropped)
