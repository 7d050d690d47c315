"""`flash dashboard`: the pages, in a browser that gets the caller's key by a one-time link."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated

import typer

from flash.cli.connection import connect
from flash.cli.output import globals_of, note, say, say_json

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def dashboard(
    ctx: typer.Context,
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Open this run's page.")] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the address; open no browser.")] = False,
) -> None:
    """Open the dashboard in a browser.

    The printed link lets one browser in, once, within two minutes; the address itself lasts.
    """
    options = globals_of(ctx)
    with connect() as client:
        if run_id is not None:
            client.run(run_id)  # an unknown run is an error here rather than in the browser
        link = client.dashboard_link(run_id)
    if options.json:
        say_json({"url": link})
    elif options.human():
        say(f"The dashboard: {link}")
        note("(The link works once, for two minutes; for another browser run `flash dashboard` again.)")
        if not no_open and _has_screen():
            webbrowser.open(link)
    else:
        say(link)


def _has_screen() -> bool:
    """Whether a browser that is started here would be seen."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
