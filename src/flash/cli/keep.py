"""`flash keep`: how long a run's files stay on the server after its end."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from flash.cli.connection import connect
from flash.cli.output import globals_of, say, say_json
from flash.errors import InvalidInput

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def keep(
    ctx: typer.Context,
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID")],
    days: Annotated[float | None, typer.Option("--days", min=0, help="Only so many days from the run's end.")] = None,
    no: Annotated[bool, typer.Option("--no", help="As long as the server keeps any run's.")] = False,
) -> None:
    """Keep a run's files for good, or for some days."""
    if no and days is not None:
        raise InvalidInput("--no and --days exclude each other", remedy="name one of them")
    with connect() as client:
        run = client.keep(run_id, pinned=days is None and not no, days=days)
    if globals_of(ctx).json:
        say_json(run.model_dump(mode="json"))
    elif run.managed.pinned:
        say(f"{run.run_id} is kept for good")
    elif days is not None:
        say(f"{run.run_id} is kept for {days:g} day(s) from its end")
    elif run.managed.kept_until is not None:
        say(f"{run.run_id} is kept until {time.strftime('%Y-%m-%d', time.gmtime(run.managed.kept_until))}")
    else:
        say(f"{run.run_id} is kept as long as the server keeps any run")
