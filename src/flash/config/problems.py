"""What is wrong with a config, in words: one line a problem, `key = value: rule; remedy`.

Owns the wording, the hints for unknown keys and the hiding of values that may be secret. It decides
nothing: the rules are in `run.py`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flash.config.recipes import train_defaults
from flash.config.run import ALGORITHMS, FaultsError, RunConfig, Section, TrainSection, keys_of, section_of
from flash.config.secret_rules import name_looks_secret, worker_value_fault

Path = tuple[str, ...]
HIDDEN = "(hidden)"


def problem_lines(details: Sequence[ErrorDetails], sound: RunConfig | None) -> list[str]:
    """All problems that validation found; `sound` is what is valid, for the defaults that remedies name."""
    return [one_line(line) for detail in details for line in _lines(detail, sound)]


def _lines(detail: ErrorDetails, sound: RunConfig | None) -> Iterator[str]:
    path = path_of(detail)
    key, value = dotted(path), detail["input"]
    match detail["type"]:
        case "missing":
            yield f"{key}: is required and missing; {_REQUIRED.get(key, 'add it')}"
        case "extra_forbidden":
            plain = not isinstance(value, (Mapping, list))
            yield f"{key}{f' = {shown(value, path)}' if plain else ''}: unknown key; {_unknown_remedy(path)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            line = ' with id = "..." below it' if key == "environment" else ""
            yield f"{key} = {shown(value, path)}: must be a table; write [{key}]{line}"
        case "value_error" if isinstance(error := detail["ctx"]["error"], FaultsError):
            for below, rule in error.faults:
                yield f"{dotted((*path, *map(str, below)))}: {_with_remedy(rule, key, sound)}"
        case kind:
            rule, appearance = _with_remedy(_rule(kind, detail), key, sound), shown(value, path)
            if appearance == HIDDEN:
                rule = rule.replace(value, HIDDEN) if value else rule
            yield f"{key}: {rule}" if len(path) < len(detail["loc"]) else f"{key} = {appearance}: {rule}"


def _rule(kind: str, detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    match kind:
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "greater_than":
            return f"must be above {context['gt']:g}"
        case "less_than_equal":
            return f"must be at most {int(context['le']):,}"
        case _:
            return detail["msg"][:1].lower() + detail["msg"][1:]


# --- remedies -----------------------------------------------------------------------------------------

_REQUIRED = {
    "model": 'add model = "Qwen/Qwen3.5-4B", or another that `flash models` lists',
    "environment": 'add [environment] with id = "namespace/name"; `flash env list` shows yours',
    "environment.id": 'add id = "namespace/name" under [environment]; `flash env list` shows yours',
}


def _with_remedy(rule: str, key: str, sound: RunConfig | None) -> str:
    if ";" in rule:
        return rule
    default = _default(key, sound)
    return f"{rule}; leave it out to use {default}" if default else f"{rule}; correct it or leave it out"


def _default(key: str, sound: RunConfig | None) -> str | None:
    section, _, name = key.rpartition(".")
    if key in ("algorithm", "thinking"):
        return f"the default of {json.dumps(RunConfig.model_fields[key].default)}"
    if section != "train" or name not in TrainSection.model_fields:
        return None
    own = TrainSection.model_fields[name].default
    if own is not None:
        return f"the default of {own}"
    if sound is None:
        return "the recipe's default"
    algorithm = next((each for each in ALGORITHMS if name in keys_of(each)), sound.algorithm)
    value = train_defaults(algorithm, sound.model, sound.thinking).get(name)
    return None if value in (None, ()) else f"the recipe's {value:g}"


_ONE_TABLE = "both algorithms share one table; move its keys to [train]"
_ELSEWHERE = {
    "sft": _ONE_TABLE,
    "grpo": _ONE_TABLE,
    "set": "overrides belong on the command line; use `flash train --set KEY=VALUE`",
}
_MANAGED = frozenset(
    {
        "gpu", "gpus", "gpu_type", "gpu_count", "num_gpus", "hardware", "device", "provider", "cluster",
        "region", "image", "docker_image", "disk", "timeout", "wall_clock", "wall_clock_limit",
        "max_wall_seconds", "retries", "max_retries", "bucket",
    }
)  # fmt: skip


def _unknown_remedy(path: Path) -> str:
    name = path[-1]
    if name == "seed":
        return "the seed is no key of the config; use `flash train --seed N`"
    if len(path) == 1 and name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in _MANAGED:
        return "Flash chooses this itself; remove it, and see the choice in `flash status`"
    siblings = [key.rpartition(".")[2] for key in known_keys() if key.rpartition(".")[0] == ".".join(path[:-1])]
    if near := _nearest(name, siblings):
        return f"did you mean {'.'.join((*path[:-1], near))}?"
    everywhere = {key.rpartition(".")[2]: key for key in reversed(known_keys())}
    if near := _nearest(name, list(everywhere)):
        return f"did you mean {everywhere[near]}?"
    return f"remove it; the keys here are {', '.join(siblings)}"


def _nearest(name: str, names: list[str]) -> str | None:
    plain = name.lower().replace("-", "_")[:100]
    if near := difflib.get_close_matches(plain, names, n=1, cutoff=0.6):
        return near[0]
    containing = [each for each in names if len(plain) >= 4 and (plain in each or each in plain)]
    return min(containing, key=len, default=None)


def known_keys() -> list[str]:
    """Every dotted key, sections included, in the order of the reference."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield prefix + name
            if inner := section_of(field.annotation):
                yield from walk(inner, f"{prefix}{name}.")

    return list(walk(RunConfig, ""))


# --- keys and values on one line ----------------------------------------------------------------------


def path_of(detail: ErrorDetails) -> Path:
    """Where the fault is. Validation adds "[key]" where it is a key itself; someone's key may be called so, too."""
    path = tuple(str(part) for part in detail["loc"])
    return path[:-1] if path[1:] and path[-1] == "[key]" and path[-2] == str(detail["input"]) else path


def dotted(path: Path) -> str:
    """`a.b`, with parts quoted as in TOML where they are no bare keys."""
    return ".".join(_shown_part(part) for part in path)


def _shown_part(part: str) -> str:
    if part and len(part) <= 60 and all(c.isascii() and (c.isalnum() or c in "_-") for c in part):
        return part
    return shown(part)


def shown(value: Any, path: Path = ()) -> str:
    """A value as TOML would write it, on one line, cut short, and hidden where it may be a secret."""
    if isinstance(value, str):
        if worker_value_fault(value) or any(name_looks_secret(part) for part in path):
            return HIDDEN
        return one_line(json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=False))
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "(a huge number)"
    if isinstance(value, (list, tuple)):
        items = [shown(item, path) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{', '.join(items)}]"
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    return one_line(str(value)[:60])


def one_line(text: str) -> str:
    """Without characters that a terminal would act on or break the line at."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- what remains valid -------------------------------------------------------------------------------


def sound_part(tables: Mapping[str, Any], details: Sequence[ErrorDetails]) -> RunConfig | None:
    """The config without its faulty keys, so that rules between the others can be checked all the same.

    A faulty model or environment is replaced by a name that stands for none. None where nothing is valid.
    """
    sound = _without(tables, [path_of(detail) for detail in details])
    sound.setdefault("model", "faulty")
    environment = sound.get("environment")
    sound["environment"] = {"id": "faulty/faulty", **(environment if isinstance(environment, dict) else {})}
    try:
        return RunConfig.model_validate(sound)
    except ValidationError:
        return None


def _without(tables: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    kept = {}
    for key, value in tables.items():
        below = [path[1:] for path in paths if path[:1] == (key,)]
        if () not in below:
            kept[key] = _without(value, below) if below and isinstance(value, Mapping) else value
    return kept
