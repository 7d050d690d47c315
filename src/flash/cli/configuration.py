"""`flash config`: the training config, described for editors."""

from __future__ import annotations

import typer

from flash.cli.output import say_json
from flash.config.reference import json_schema

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def config() -> None:
    """Describe the training config."""


@app.command()
def schema() -> None:
    """Print the config's JSON Schema, for completion and checks in an editor."""
    say_json(json_schema())
