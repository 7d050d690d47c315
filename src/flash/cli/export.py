"""`flash export`: an adapter out of the server, as a PEFT folder or a Hugging Face repository."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from flash.cli.connection import connect
from flash.cli.output import globals_of, note, say, say_json
from flash.client.exporting import export_adapter
from flash.client.publishing import check_repository, publish_folder
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
    repository: Annotated[
        str | None,
        typer.Option("--repository", metavar="OWNER/NAME", help="A Hugging Face repository to upload it to."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone read the repository; a new one is private otherwise.")
    ] = False,
) -> None:
    """Copy an adapter out of the server.

    Into a folder, which appears only when every file's digest was right, or into a Hugging Face repository, under
    your own login there: HF_TOKEN, or what `hf auth login` saved.
    """
    options = globals_of(ctx)
    if output is None and repository is None:
        raise InvalidInput("nowhere to export to", remedy="pass --output DIR or --repository OWNER/NAME")
    if public and repository is None:
        raise InvalidInput("--public says who may read a repository", remedy="pass --repository OWNER/NAME with it")
    if repository is not None:
        check_repository(repository)
    progress = note if options.verbose else lambda name: None
    with connect() as client, tempfile.TemporaryDirectory() as scratch:
        done = export_adapter(client, adapter_id, output or Path(scratch) / "adapter", progress=progress)
        address = None
        if repository is not None:
            message = f"{done.run_id}/step-{done.step}, by Flash"
            address = publish_folder(done.folder, repository, public=public, message=message)
    if options.json:
        say_json(
            {
                "run_id": done.run_id,
                "step": done.step,
                "output": str(done.folder.resolve()) if output else None,
                "repository": repository,
                "url": address,
                "files": list(done.files),
                "size": done.size,
            }
        )
    else:
        places = [str(place) for place in (output, address) if place is not None]
        size = f"{len(done.files)} files, {done.size / 1e6:.1f} MB"
        say(f"{done.run_id} step {done.step}: {size} in {' and '.join(places)}")
