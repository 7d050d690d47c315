"""`flash profile`: where a run's time went, as a trace to look at and as sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flash.cli.connection import connect
from flash.cli.output import globals_of, note, say, say_json
from flash.cli.progress import duration, events_removed
from flash.errors import InvalidInput, NotFound

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def profile(
    ctx: typer.Context,
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="The run's id, as `flash runs` lists it.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The trace's file.  [default: RUN_ID.trace.json]")
    ] = None,
) -> None:
    """Write where a run's time went as a trace, and sum it up.

    The trace opens in ui.perfetto.dev and in chrome://tracing: phases, steps and their parts, uploads, each attempt on
    tracks of its own. A run that goes on is shown as far as it is.
    """
    from flash.client.profiling import PROFILED, chrome_trace
    from flash.client.profiling import profile as profiled

    with connect() as client:
        run = client.run(run_id)
        if removed := events_removed(run):
            raise NotFound(f"there is nothing to make a profile of: {removed}")
        found = profiled(run, client.history(run_id, kinds=PROFILED))
    path = output or Path(f"{run.run_id}.trace.json")
    try:
        path.write_text(json.dumps(chrome_trace(found)), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"{path} can't be written: {error.strerror}", remedy="choose another --output FILE"
        ) from error
    seconds = found.seconds()
    if globals_of(ctx).json:
        say_json(
            {"run_id": run.run_id, "output": str(path.resolve()), "spans": found.spans(), "seconds": seconds}
        )
        return
    width = max((len(name) for name in seconds), default=0)
    for name, value in seconds.items():
        say(f"{name:<{width}}  {_long(value)}")
    note(f"{path}: {found.spans():,} spans; open it in https://ui.perfetto.dev or chrome://tracing")


def _long(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 60 else duration(seconds)
