"""Putting a config together: overlays merged deeply, then `--set KEY=VALUE` in order.

Owns the two rules of composition. It validates nothing beyond the shape that it needs to walk.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from flash.config.problems import dotted
from flash.config.run import RunConfig, section_of, unwrapped

Tables = dict[str, Any]


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Tables:
    """`overlay` over `base`: tables merge deeply, scalars and lists replace. Neither is changed."""
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        both_tables = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both_tables else value  # type: ignore[arg-type]
    return merged


def apply_override(base: Mapping[str, Any], override: str) -> Tables:
    """`base` with one `KEY=VALUE` set; raises ValueError with the whole problem line."""
    path, text = split_override(override)
    overlaid = _copy(base)
    table: Any = overlaid
    for depth, part in enumerate(path[:-1], start=1):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            whole, parent = dotted(path), dotted(path[:depth])
            raise ValueError(f"{whole}: can't be set, as {parent} is not a table; remove one of the two")
    table[path[-1]] = read_value(path, text)
    return overlaid


def split_override(override: str) -> tuple[tuple[str, ...], str]:
    """`a.b = c` as (("a", "b"), "c"): split at the first `=`, both sides trimmed."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals:
        raise ValueError(f"--set {override!r:.80}: must be KEY=VALUE; write for example --set train.epochs=3")
    path = tuple(part.strip() for part in key.split("."))
    if not all(path):
        raise ValueError(f"--set {override!r:.80}: has an empty key; write for example --set train.epochs=3")
    return path, value.strip()


def read_value(path: tuple[str, ...], text: str) -> Any:
    """What VALUE means at this key: text for a string field, else TOML, else bare words."""
    if declared_type(path) is str:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    found = _as_toml(text)
    if found is not None:
        return found
    if text.startswith("[") and text.endswith("]"):
        words = (word.strip() for word in text[1:-1].split(","))
        return [_unquoted(word) for word in words if word]
    return text


def _as_toml(text: str) -> Any:
    """The TOML value in `text`, or None. Dates stay text: no key of a config is one."""
    if "\n" in text or "\r" in text:
        return None
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return None
    value = found["value"]
    return value if isinstance(value, (bool, int, float, str, list, dict)) else None


def _unquoted(word: str) -> str:
    return word[1:-1] if len(word) >= 2 and word[0] == word[-1] and word[0] in "'\"" else word


def declared_type(path: tuple[str, ...]) -> Any:
    """`str` where the config declares a string at this key, another type or None elsewhere."""
    annotation: Any = RunConfig
    for part in path:
        if section := section_of(annotation):
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
        elif get_origin(unwrapped(annotation)) is dict:
            annotation = get_args(unwrapped(annotation))[1]
        else:
            return None
    inner = unwrapped(annotation)
    return str if get_origin(inner) is Literal else inner


def _copy(tables: Mapping[str, Any]) -> Tables:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tables.items()}
