"""Where secrets come from at submit: the shell, `.env.local` and `.env`.

Owns the search and the reading of dotenv files. Which names are allowed is `secret_rules.py`'s matter.
It never logs or echoes a value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from flash.config.run import RunConfig
from flash.errors import ConfigError

WANDB_KEY = "WANDB_API_KEY"


def resolve_secrets(
    config: RunConfig,
    config_dir: Path,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> dict[str, str]:
    """The values of `environment.secrets`, and of WANDB_API_KEY wherever it is set.

    Each is taken from the first place where it is set and not empty: `environ` (the shell by default),
    then `.env.local` and `.env` in `cwd`, then both in `config_dir`. Raises ConfigError naming every
    secret that is set nowhere.
    """
    return find_secrets(config.environment.secrets, config_dir, environ, cwd)


def find_secrets(
    wanted: Sequence[str],
    config_dir: Path | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> dict[str, str]:
    """What `resolve_secrets` does, for names that are known without a config file."""
    places = [dict(os.environ if environ is None else environ)]
    here = cwd or Path.cwd()
    folders = dict.fromkeys(path.resolve() for path in (here, config_dir or here))
    places += [read_env_file(folder / file) for folder in folders for file in (".env.local", ".env")]

    found: dict[str, str] = {}
    for name in dict.fromkeys([*wanted, WANDB_KEY]):
        value = next((place[name] for place in places if place.get(name)), None)
        if value is not None:
            found[name] = value
    missing = [name for name in wanted if name not in found]
    if missing:
        where = " or ".join(str(folder) for folder in folders)
        remedy = f"set it in your shell, or in .env.local or .env in {where}"
        raise ConfigError([f"environment.secrets: {name} is not set; {remedy}" for name in missing])
    return found


def wandb_warnings(config: RunConfig, secrets: Mapping[str, str]) -> list[str]:
    """A warning where `[wandb]` asks for logging that a missing key keeps off."""
    if config.wandb is None or WANDB_KEY in secrets:
        return []
    return [f"wandb: {WANDB_KEY} is not set where you submit, so nothing is logged to W&B; the run trains on"]


_ASSIGNMENT = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*
        (?:'(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | (?P<bare>[^\n]*))""",
    re.MULTILINE | re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$"}


def read_env_file(path: Path) -> dict[str, str]:
    """`NAME=value` lines of a dotenv file; {} where there is none.

    Understands `export`, comments, single quotes (literal) and double quotes (with escapes), both over
    several lines. It expands no variables. A later line wins.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        problem = f"environment.secrets: can't read {path}: {reason}; correct or remove the file"
        raise ConfigError([problem]) from None

    values: dict[str, str] = {}
    position = 0
    text = text.replace("\r\n", "\n")
    while match := _ASSIGNMENT.search(text, position):
        position = match.end()
        if match["single"] is not None:
            value = match["single"]
        elif match["double"] is not None:
            value = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), match["double"], flags=re.DOTALL)
        else:
            value = re.split(r"(?:^|[ \t])#", match["bare"], maxsplit=1)[0].strip()
        values[match["name"]] = value
    return values
