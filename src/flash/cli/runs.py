"""`flash runs`, `status`, `log`, `samples`, `cancel`, `priority`, `checkpoints`: what was submitted, how it goes."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from flash.cli.connection import connect
from flash.cli.follow import detaching, exit_unless_done, follow_to_end
from flash.cli.output import globals_of, note, say, say_json, say_json_line
from flash.cli.progress import events_removed, plain_lines, step_text
from flash.records import Event, EventKind, Priority, RunState

app = typer.Typer(add_completion=False, rich_markup_mode=None)

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="The run's id, as `flash runs` lists it.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")]

LOG_KINDS = (EventKind.STATE, EventKind.ATTEMPT, EventKind.PHASE, EventKind.LOG, EventKind.WARNING)


@app.command()
def runs(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many.")] = 20,
) -> None:
    """List runs, newest first."""
    options = globals_of(ctx)
    with connect() as client:
        found = client.runs(limit=limit)
    if options.json:
        say_json({"runs": [run.model_dump(mode="json") for run in found]})
    elif options.human():
        from flash.cli.render import print_runs

        print_runs(found)
    else:
        for run in found:
            step = step_text(run.step, run.total_steps)
            say(f"{run.run_id} {run.state.value} {step} {run.algorithm} {run.model} {run.environment}")


@app.command()
def status(ctx: typer.Context, run_id: RunId, follow: Follow = False) -> None:
    """Show a run: what happened and what comes next.

    JSON when piped.
    """
    options = globals_of(ctx)
    with connect() as client:
        run = client.run(run_id)
        if follow and not run.state.terminal:
            follow_to_end(client, run, options)
            return
        if options.human():
            from flash.cli.render import print_status

            print_status(run, verbose=options.verbose)
            note(f"In a browser: {client.page(run_id)} (or: flash dashboard {run_id})")
        else:
            say_json(run.model_dump(mode="json"))
        if follow:
            exit_unless_done(run)


@app.command()
def log(ctx: typer.Context, run_id: RunId, follow: Follow = False) -> None:
    """Print a run's log.

    With --json, one event a line.
    """
    options = globals_of(ctx)
    with connect() as client:
        run = client.run(run_id)  # an unknown run is an error even where it has no events
        if removed := events_removed(run):
            note(removed)
        with detaching(run_id) if follow else nullcontext():
            for event in client.follow(run_id) if follow else client.history(run_id):
                if options.json:
                    say_json_line(event.model_dump(mode="json"))
                elif options.verbose or event.kind in LOG_KINDS:
                    for line in plain_lines(event):
                        say(f"{_clock(event)} {line}")
        if follow:
            exit_unless_done(client.run(run_id))


@app.command()
def samples(
    ctx: typer.Context,
    run_id: RunId,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest N.")] = 20,
) -> None:
    """Print the completions that a run recorded."""
    with connect() as client:
        run = client.run(run_id)
        found = list(client.history(run_id, kinds=(EventKind.SAMPLE,)))[-limit:]
    if globals_of(ctx).json:
        say_json({"samples": [{"time": event.time, **event.data} for event in found]})
        return
    if not found:
        note(events_removed(run) or "no samples recorded")
    for event in found:
        rest = {key: value for key, value in event.data.items() if key != "pieces"}  # the text, token by token
        numbers = {key: rest.pop(key) for key, value in event.data.items() if isinstance(value, int | float)}
        say("--- " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
        for key, value in rest.items():
            say(f"{key}: {_text(value)}")


@app.command()
def cancel(ctx: typer.Context, run_id: RunId) -> None:
    """Cancel a run; its checkpoints stay."""
    with connect() as client:
        run = client.cancel(run_id)
    if globals_of(ctx).json:
        say_json(run.model_dump(mode="json"))
    elif run.state is RunState.CANCELLED or not run.state.terminal:
        say(f"{run_id} is {'cancelled' if run.state.terminal else 'being cancelled'}. {run.next}".strip())
    else:
        say(f"{run_id} had ended already: {run.state.value}")


@app.command()
def priority(
    ctx: typer.Context, run_id: RunId, priority: Annotated[Priority, typer.Argument(help="low, normal or high.")]
) -> None:
    """Move a queued run up or down among your organisation's."""
    with connect() as client:
        run = client.set_priority(run_id, priority)
    if globals_of(ctx).json:
        say_json(run.model_dump(mode="json"))
    else:
        say(f"{run_id} has priority {run.priority.value}: {run.summary}; {run.next}")


@app.command()
def checkpoints(ctx: typer.Context, run_id: RunId) -> None:
    """List a run's checkpoints.

    One a line when piped: step N RUN_ID/step-N.
    """
    options = globals_of(ctx)
    with connect() as client:
        found = client.checkpoints(run_id)
    if options.json:
        rows = [{"ref": each.ref, **each.model_dump(mode="json")} for each in found]
        say_json({"run_id": run_id, "checkpoints": rows})
    elif options.human():
        from flash.cli.render import print_checkpoints

        print_checkpoints(found)
    else:
        for each in found:
            say(f"step {each.step} {each.ref}")


def _clock(event: Event) -> str:
    return time.strftime("%H:%M:%S", time.localtime(event.time))


def _text(value: Any) -> str:
    if isinstance(value, list):  # messages
        return "".join(
            f"\n  [{m.get('role')}] {m.get('content')}" if isinstance(m, dict) else f"\n  {m}" for m in value
        )
    return str(value)
