"""Following a run to its end: a live display on a terminal, plain lines elsewhere.

Owns what Ctrl-C means there (the run goes on) and the exit code that a run's end gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer

from flash.cli.output import FAILED, INTERRUPTED, Globals, note, say, say_json
from flash.cli.progress import Progress, plain_lines
from flash.errors import from_wire
from flash.records import RunState, RunStatus

if TYPE_CHECKING:
    from flash.client.client import FlashClient


def follow_to_end(client: FlashClient, run: RunStatus, options: Globals, *, after: int = 0) -> None:
    """Shows the run until it ends, then its outcome; exits with 1 unless it ended `done`.

    With `--json` stdout has the final status alone, and the lines go to stderr.
    """
    progress = Progress(run.run_id, state=run.state.value, total_steps=run.total_steps)
    with detaching(run.run_id):
        with _display(progress, run, options):
            for event in client.follow(run.run_id, after=after):
                progress.apply(event)
                if not options.human():
                    for line in plain_lines(event):
                        (note if options.json else say)(line)
        ended = client.run(run.run_id)
    conclude(ended, options)


def _display(progress: Progress, run: RunStatus, options: Globals) -> AbstractContextManager[object]:
    if not options.human():
        return nullcontext()
    from flash.cli.render import live_display

    return live_display(progress, run)


@contextmanager
def detaching(run_id: str) -> Iterator[None]:
    """Ctrl-C inside leaves the run alone: it says how to come back, and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"\ndetached; the run goes on. Follow it: flash status {run_id} -f   Stop it: flash cancel {run_id}")
        raise typer.Exit(INTERRUPTED) from None


def conclude(run: RunStatus, options: Globals) -> None:
    """The outcome in words (or JSON), and the exit code."""
    if options.json:
        say_json(run.model_dump(mode="json"))
    else:
        if run.state is not RunState.FAILED:  # what failed is said once, as the error
            say(run.summary)
        if run.next:
            say(f"Next: {run.next}")
    exit_unless_done(run)


def exit_unless_done(run: RunStatus) -> None:
    if run.state is RunState.DONE:
        return
    reason = f": {' '.join(str(from_wire(run.error)).split())}" if run.error else ""
    note(f"error: run {run.run_id} ended {run.state.value}{reason}")
    raise typer.Exit(FAILED)
