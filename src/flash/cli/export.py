"""`flash export`: an adapter out of the server, as a PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash.cli.connection import connect
from flash.cli.output import globals_of, note, say, say_json
from flash.client.exporting import export_adapter
from flash.errors import InvalidInput

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def export(
    ctx: typer.Context,
    adapter_id: Annotated[
        str, typer.Option("--adapter-id", metavar="ID", help="RUN_ID for the final adapter, or RUN_ID/step-N.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="A new or empty folder to copy it into.")
    ] = None,
    repository: Annotated[str | None, typer.Option("--repository", hidden=True)] = None,
) -> None:
    """Copy an adapter out of the server.

    Every file is checked against its digest; the folder appears only when it is complete.
    """
    options = globals_of(ctx)
    if repository is not None:
        raise InvalidInput("--repository is not available yet", remedy="use --output DIR for a local copy")
    if output is None:
        raise InvalidInput("nowhere to export to", remedy="pass --output DIR")
    with connect() as client:
        done = export_adapter(client, adapter_id, output, progress=note if options.verbose else lambda name: None)
    if options.json:
        say_json(
            {
                "run_id": done.run_id,
                "step": done.step,
                "output": str(done.folder.resolve()),
                "files": list(done.files),
                "size": done.size,
            }
        )
    else:
        say(f"{done.run_id} step {done.step}: {len(done.files)} files, {done.size / 1e6:.1f} MB in {done.folder}")
