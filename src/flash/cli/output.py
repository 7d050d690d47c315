"""How a command speaks: JSON or text, on which stream, with which exit code.

Owns the global options and the form of errors. Imports no terminal library; tables are `render.py`'s.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass
from typing import Any, cast

import typer

from flash.errors import ConfigError, FlashError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass
class Globals:
    """The options that every command takes, set as they are parsed."""

    json: bool = False
    debug: bool = False
    verbose: bool = False

    def human(self) -> bool:
        """Whether to draw for a person: a terminal, and JSON not asked for."""
        return not self.json and sys.stdout.isatty()


def globals_of(ctx: typer.Context) -> Globals:
    return cast(Globals, ctx.obj)


def say(text: str = "") -> None:
    """A line on stdout: what was asked for."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line on stderr: what goes on beside the answer."""
    print(text, file=sys.stderr, flush=True)


def say_json(value: Any) -> None:
    """One JSON document on stdout."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def say_json_line(value: Any) -> None:
    say(json.dumps(value, ensure_ascii=False))


HELP_PAGE = "docs/troubleshooting.md"


def report(error: Exception, *, debug: bool, verbose: bool = False) -> None:
    """The error on stderr: one line for each problem; the traceback only under `--debug`.

    `verbose` adds a line with the place in the documentation.
    """
    if debug:
        traceback.print_exception(error)
        if isinstance(error, FlashError) and error.detail:
            note(error.detail.rstrip())
    if isinstance(error, ConfigError):
        for problem in error.problems:
            note(f"error: {problem}")
    elif isinstance(error, FlashError):
        hint = " [--debug shows more]" if error.detail and not debug else ""
        note(f"error: {_one_line(str(error))}{hint}")
    else:
        hint = "" if debug else " [--debug shows the traceback]"
        note(f"error: unexpected {type(error).__name__}: {_one_line(str(error))}{hint}")
    if verbose and isinstance(error, FlashError):
        note(f"more: {HELP_PAGE}#{error.code}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
