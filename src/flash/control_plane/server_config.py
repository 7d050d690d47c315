"""How the server's settings are read: `server.toml`, then variables FLASH_SERVER_<NAME> over it.

Owns the reading and the words for what is wrong; every problem of a file is told in one go. What the settings are is
`settings`'s. A path in a file is relative to the file's folder. Values that may be secret are never quoted back.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from flash.catalog.catalog import flash_home
from flash.control_plane.settings import ServerSettings
from flash.errors import ConfigError, InvalidInput

PREFIX = "FLASH_SERVER_"
_SECRET = frozenset({"database_url", "store_options", "github_token", "ray_token"})
_PATHS = ("home", "vault_key_file")
# What a server with a config file is: not a laptop's. The file and the environment may say otherwise.
TEAM: dict[str, Any] = {"idle_exit_s": 0.0, "log_to": "stderr"}


def variable(name: str) -> str:
    """The environment variable that sets this key."""
    return "GITHUB_TOKEN" if name == "github_token" else PREFIX + name.upper()


def load_settings(home: Path, environment: Mapping[str, str] = os.environ, **given: Any) -> ServerSettings:
    """A laptop's settings for `home`: FLASH_SERVER_* over the defaults, and `given` over those."""
    values = _from_environment(environment)
    values.pop("home", None)
    return _validated({**values, **given, "home": home.absolute()}, environment, None)


def load_server_config(path: Path, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """The settings of a server that was started with a file. Raises InvalidInput or ConfigError."""
    document = _read(path)
    folder = path.absolute().parent
    for name in _PATHS:
        if isinstance(document.get(name), str):
            document[name] = folder / Path(document[name]).expanduser()
    values = {**TEAM, "home": flash_home(), **document, **_from_environment(environment)}
    settings = _validated(values, environment, path)
    return settings.model_copy(update={"home": settings.home.absolute()})


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error.strerror}", remedy="name a file that is there") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}") from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name, field in ServerSettings.model_fields.items():
        text = environment.get(variable(name))
        if text is not None:
            values[name] = _parsed(text, field.annotation)
    return values


def _parsed(text: str, annotation: Any) -> Any:
    """Lists are comma-separated, tables are name=value pairs; the rest is left to the field's type."""
    kinds = {get_origin(kind) for kind in (annotation, *get_args(annotation))}
    if tuple in kinds:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if dict in kinds:
        pairs = (part.partition("=") for part in text.split(",") if part.strip())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return text


def _validated(values: dict[str, Any], environment: Mapping[str, str], path: Path | None) -> ServerSettings:
    try:
        return ServerSettings(**values)
    except ValidationError as error:
        problems = [_problem(found, environment, path) for found in error.errors()]
    raise InvalidInput(problems[0]) if len(problems) == 1 else ConfigError(problems)


def _problem(found: Any, environment: Mapping[str, str], path: Path | None) -> str:
    """One line: where, the value, the rule, the remedy."""
    name = str(found["loc"][0]) if found["loc"] else ""
    place = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, ServerSettings.model_fields, n=1)
        return f"{path}: {place}: no such key; " + (f"did you mean {near[0]}?" if near else "see docs/server.md")
    value = "" if name in _SECRET else f" = {found['input']!r:.80}"
    rule = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if variable(name) in environment or path is None:
        return f"server setting {place}{value}: {rule}; set {variable(name)} right, or leave it out"
    return f"{path}: {place}{value}: {rule}"
