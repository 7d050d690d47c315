"""`flash models`: the base models that this machine's catalog knows."""

from __future__ import annotations

import typer

from flash.catalog.catalog import load_catalog
from flash.cli.output import globals_of, say, say_json

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def models(ctx: typer.Context) -> None:
    """List the base models."""
    options = globals_of(ctx)
    entries = list(load_catalog())
    if options.json:
        say_json({"models": [entry.model_dump(mode="json") for entry in entries]})
    elif options.human():
        from flash.cli.render import print_models

        print_models(entries)
    else:
        for entry in entries:
            say(f"{entry.id} {entry.size}")
