"""`flash deploy`, `deployments` and `undeploy`: which runs answer by their names, and where."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flash.cli.connection import connect, openai_access
from flash.cli.output import INTERRUPTED, Globals, globals_of, note, say, say_json
from flash.client.exporting import parse_reference
from flash.records import DeployAnswer, Deployment, DeployRequest

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def deploy(
    ctx: typer.Context,
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_ID[/step-N]", help="A run's final adapter, or one of its checkpoints.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Go live at once, without a smoke completion.")
    ] = False,
) -> None:
    """Serve an adapter behind an OpenAI-compatible API.

    The run's id is the model's name. It moves to the new adapter only after a short completion came out right;
    until then, and if that fails, what was live stays live.
    """
    options = globals_of(ctx)
    run_id, step = parse_reference(adapter)
    request = DeployRequest(run_id=run_id, step=step, verify=not no_verify, dry_run=dry_run)
    with connect() as client:
        told: str | None = None
        try:
            while (answer := client.deploy(request)).state == "waiting":
                if answer.wait != told:
                    note(f"{answer.wait or 'waiting'} ...")
                told = answer.wait
        except KeyboardInterrupt:
            note(f"\ninterrupted: {answer.live or 'nothing'} is live" if told else "\ninterrupted")
            raise typer.Exit(INTERRUPTED) from None
        access = openai_access(client)
    if options.json:
        say_json({**_document(run_id, answer), **access})
    elif answer.state == "planned":
        _say_plan(answer)
    elif options.human():
        say(f"{answer.ref} is live.")
        say(f"  base_url    {access['base_url']}")
        say(f"  model       {run_id}")
        say(f"  key         {access['token_file'] or 'your own'}")
        say(f"Next: flash chat {run_id} -m \"Hello\"")
    else:
        say(answer.ref)


def _document(run_id: str, answer: DeployAnswer) -> dict[str, Any]:
    """`model` is the name to ask for, as in every other place; the base has a key of its own."""
    said = answer.model_dump(mode="json")
    return {**said, "run_id": run_id, "model": run_id, "base": said["model"]}


def _say_plan(answer: DeployAnswer) -> None:
    say(f"would deploy {answer.ref} (base {answer.model})")
    say(f"  live now    {answer.live or 'nothing'}")
    if answer.engine is not None:
        say(f"  engine      {answer.engine.state.value} on {answer.engine.device or 'no device yet'}")
    else:
        say(f"  engine      a new one on {answer.device}" if answer.device else "  engine      a new one")
    if answer.wait:
        say(f"  {answer.wait}")
    say("Nothing was changed.")


@app.command()
def deployments(ctx: typer.Context) -> None:
    """List what is deployed."""
    options = globals_of(ctx)
    with connect() as client:
        found = client.deployments()
        access = openai_access(client)
    if options.json:
        say_json({"deployments": [{**_listed(each), **access} for each in found]})
    elif options.human():
        from flash.cli.render import print_deployments

        print_deployments(found, access["base_url"] or "")
    else:
        for each in found:
            say(f"{each.ref} {each.model} {each.engine.state.value if each.engine else 'idle'}")


def _listed(deployment: Deployment) -> dict[str, Any]:
    said = deployment.model_dump(mode="json")
    return {**said, "model": deployment.run_id, "base": deployment.model}


@app.command()
def undeploy(
    ctx: typer.Context, run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="A deployed run.")]
) -> None:
    """Take a run's name back; its adapters stay."""
    options: Globals = globals_of(ctx)
    with connect() as client:
        before = client.undeploy(run_id)
    if options.json:
        say_json(_listed(before))
    else:
        say(f"{before.run_id} answers no more (it was {before.ref})")
