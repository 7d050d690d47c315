"""`flash train`: a config in, a run out; `--dry-run` shows what it would be and asks no server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash.catalog.catalog import load_catalog
from flash.catalog.deploying import deployment_notes
from flash.cli.output import INTERRUPTED, Globals, globals_of, note, say, say_json
from flash.config.load import LoadedConfig, load_config
from flash.config.recipes import dry_run_document, resolve
from flash.records import Priority, RunStatus, SubmitRequest

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def train(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's TOML file.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show everything decided; submit nothing.")
    ] = False,
    background: Annotated[bool, typer.Option("--background", help="Submit and return at once.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed of the run.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. train.epochs=3; repeatable."),
    ] = None,
    overlays: Annotated[
        list[Path] | None,
        typer.Option("--config", metavar="FILE", help="Merge another TOML over CONFIG; repeatable."),
    ] = None,
    priority: Annotated[
        Priority, typer.Option("--priority", help="Its place among your organisation's queued runs.")
    ] = Priority.NORMAL,
    cost: Annotated[
        bool, typer.Option("--cost", help="Estimate time, memory and price; submit nothing.")
    ] = False,
) -> None:
    """Train an adapter from a config.

    Follows the run until it ends; Ctrl-C only detaches.
    """
    options = globals_of(ctx)
    if cost:
        _show_cost(load_config(config, overlays or (), overrides or ()), config.resolve().parent, seed, options)
        return
    if dry_run:
        loaded = load_config(config, overlays or (), overrides or ())
        _show_dry_run(loaded, seed, options)
        return
    _submit(config, overlays or [], overrides or [], seed, priority, background, options)


def _show_dry_run(loaded: LoadedConfig, seed: int, options: Globals) -> None:
    spec = resolve(loaded.config, seed=seed)
    notes = deployment_notes(load_catalog().get(spec.model), spec.train.lora_rank)
    document = dry_run_document(spec, [*loaded.warnings, *notes])
    if options.human():
        from flash.cli.render import print_dry_run

        print_dry_run(document)
    else:
        say_json(document)


def _show_cost(loaded: LoadedConfig, folder: Path, seed: int, options: Globals) -> None:
    from flash.cli.cost import cost_document

    document = cost_document(loaded, folder, seed)
    if options.human():
        from flash.cli.render import print_cost

        print_cost(document)
    else:
        say_json(document)


def _submit(
    config: Path,
    overlays: list[Path],
    overrides: list[str],
    seed: int,
    priority: Priority,
    background: bool,
    options: Globals,
) -> None:
    # The HTTP stack is imported here, since a dry run must not pay for it.
    from flash.cli.connection import connect, is_remote
    from flash.cli.follow import follow_to_end
    from flash.config.secrets import resolve_secrets, wandb_warnings

    loaded = load_config(config, overlays, overrides, check_model=not is_remote())
    secrets = resolve_secrets(loaded.config, config.resolve().parent)
    for warning in [*loaded.warnings, *wandb_warnings(loaded.config, secrets)]:
        note(f"warning: {warning}")
    request = SubmitRequest(config=loaded.config.document(), seed=seed, secrets=secrets, priority=priority)
    with connect() as client:
        try:
            run = client.submit(request)
        except KeyboardInterrupt:
            note("\ninterrupted while submitting; `flash runs` shows whether the run was accepted")
            raise typer.Exit(INTERRUPTED) from None
        if background:
            answer_background(run, options)
            return
        note(f"submitted {run.run_id}: {client.page(run.run_id)}")
        follow_to_end(client, run, options)


def answer_background(run: RunStatus, options: Globals) -> None:
    """The new run's id: in a sentence, as JSON, or alone on a line when piped."""
    if options.json:
        say_json(run.model_dump(mode="json"))
    elif options.human():
        say(f"{run.run_id} is {run.state.value}. Follow it: flash status {run.run_id} -f")
        say(f"In a browser: flash dashboard {run.run_id}")
    else:
        say(run.run_id)
