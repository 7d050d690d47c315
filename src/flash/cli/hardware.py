"""`flash gpus`: the hardware that the server can reach, and reference classes for planning."""

from __future__ import annotations

from typing import Any

import typer

from flash.catalog.hardware import gpu_classes
from flash.cli.output import globals_of, note, say, say_json
from flash.errors import FlashError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def gpus(ctx: typer.Context) -> None:
    """List hardware with memory and price."""
    from flash.cli.connection import connect

    options = globals_of(ctx)
    reachable: list[dict[str, Any]] | None = None
    try:
        with connect() as client:
            reachable = client.hardware()
    except FlashError as error:  # the reference list needs no server
        note(f"warning: what the server can reach is not known: {error}")
    reference = [gpu.model_dump(mode="json") | {"usd_per_hour": gpu.usd_per_hour} for gpu in gpu_classes()]
    if options.json:
        say_json({"reachable": reachable, "reference": reference})
    elif options.human():
        from flash.cli.render import print_hardware

        print_hardware(reachable, reference)
    else:
        for each in reachable or ():
            say(f"reachable {each['device']} {each['memory_bytes']} {each['usd_per_hour']:.2f}")
        for each in reference:
            say(f"reference {each['name'].replace(' ', '-')} {int(each['memory_gb'] * 1e9)} {each['usd_per_hour']:.2f}")
