"""`flash retry`: a new run from the exact state of one that failed or was cancelled."""

from __future__ import annotations

from typing import Annotated

import typer

from flash.cli.connection import connect
from flash.cli.follow import follow_to_end
from flash.cli.output import INTERRUPTED, globals_of, note
from flash.cli.train import answer_background
from flash.config.secrets import find_secrets

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def retry(
    ctx: typer.Context,
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="A run that failed or was cancelled.")],
    background: Annotated[bool, typer.Option("--background", help="Submit and return at once.")] = False,
) -> None:
    """Go on from where a failed or cancelled run stopped.

    A new run with the same config, seed and environment version, from the newest checkpoint's exact state.
    Secrets come from your shell, .env.local or .env, as they do for train.
    """
    options = globals_of(ctx)
    with connect() as client:
        source = client.run(run_id)
        secrets = find_secrets(source.spec["environment"]["secrets"])
        try:
            run = client.retry(run_id, secrets)
        except KeyboardInterrupt:
            note("\ninterrupted while submitting; `flash runs` shows whether the run was accepted")
            raise typer.Exit(INTERRUPTED) from None
        if background:
            answer_background(run, options)
            return
        note(f"submitted {run.run_id}, which goes on from step {run.step} of {run_id}")
        follow_to_end(client, run, options)
