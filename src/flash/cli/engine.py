"""`flash engine`: other inference engines on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from flash.catalog.catalog import flash_home
from flash.cli.output import globals_of, note, say, say_json
from flash.errors import InvalidInput

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True,
    help="Install and list inference engines.",
)  # fmt: skip
ENGINES = ("vllm",)


@app.command()
def install(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which engine: vllm.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="The build without CUDA, also where there is a GPU.")] = False,
) -> None:
    """Install an engine into a virtual environment of its own."""
    from flash.client.engines import has_gpu, install_vllm

    if name not in ENGINES:
        raise InvalidInput(f"engine {name!r}: not known", remedy=f"choose one of: {', '.join(ENGINES)}")
    options = globals_of(ctx)
    engine = install_vllm(flash_home(), cpu=cpu or not has_gpu(), say=note)
    if options.json:
        say_json({"name": engine.name, "requirement": engine.requirement, "python": str(engine.python)})
    else:
        say(f"installed {engine.requirement}")


@app.command("list")
def list_engines(ctx: typer.Context) -> None:
    """List the engines that are installed."""
    from flash.client.engines import find_engine

    found = [engine for engine in (find_engine(flash_home(), name) for name in ENGINES) if engine is not None]
    if globals_of(ctx).json:
        say_json({"engines": [
            {"name": "flash", "requirement": None, "python": None},
            *({"name": e.name, "requirement": e.requirement, "python": str(e.python)} for e in found),
        ]})  # fmt: skip
        return
    say("flash (built in)")
    for engine in found:
        say(f"{engine.name} {engine.requirement}")
