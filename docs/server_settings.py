"""The page of the server's settings, from the class that declares them: its titles, its docstrings, its defaults."""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr

from flash.control_plane import settings
from flash.control_plane.server_config import TEAM, variable
from flash.control_plane.settings import ServerSettings

_TITLE = re.compile(r"^    # --- (.+)$")


def page() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "<!-- Generated from src/flash/control_plane/settings.py by `make docs`; edit the docstrings there. -->"
    yield "# Server settings"
    yield ""
    yield (
        "Every key of the file that `flash server start --config server.toml` reads, in any order, none required. "
        "A variable of the environment, `FLASH_SERVER_` and the key in capitals, wins over the file: lists are "
        "comma-separated there, tables are `name=value` pairs. `flash server start --config server.toml --check` only "
        "says whether the file is sound. The server of a laptop reads the variables alone. Names end in their unit: "
        "`_s` is seconds; sizes are bytes. [A team's server](team-server.md) shows a whole file."
    )
    texts, titles = _said()
    for name, field in ServerSettings.model_fields.items():
        if name in titles:
            yield ""
            yield f"## {titles[name]}"
            yield ""
            yield "| key | type | default | meaning |"
            yield "| --- | --- | --- | --- |"
        note = "" if variable(name).startswith("FLASH_SERVER_") else f" Variable: `{variable(name)}`."
        text = texts[name].replace("|", "\\|")
        yield f"| `{name}` | {_type(field.annotation)} | {_default(name, field)} | {text}{note} |"


def _said() -> tuple[dict[str, str], dict[str, str]]:
    """The docstring below each field, and the title above the first field of each section."""
    source = inspect.getsource(settings)
    lines = source.splitlines()
    [declared] = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "ServerSettings"
    ]
    texts, titles, last = {}, {}, 0
    for field, below in zip(declared.body, declared.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), f"{field.target.id} is unsaid"
        texts[field.target.id] = " ".join(str(below.value.value).split())
        for line in lines[last : field.lineno]:
            if title := _TITLE.match(line):
                titles[field.target.id] = title[1]
        last = field.lineno
    return texts, titles


def _type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(kind) for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of strings"
    if get_origin(annotation) is dict:
        return "table of numbers" if get_args(annotation)[1] is float else "table of strings"
    names = {str: "string", int: "int", float: "float", bool: "bool", SecretStr: "string"}
    return names.get(annotation, "path")


def _default(name: str, field: Any) -> str:
    if name in TEAM:
        return _value(TEAM[name])
    if field.is_required():
        return "`FLASH_HOME`"
    return _value(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    if value in (None, {}, ()):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{value:,}`".replace(",", "_") if isinstance(value, int) else f"`{value:g}`"
