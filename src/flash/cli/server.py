"""`flash server`: the local server, by hand, which every other command finds or starts without being asked; and a
team's, by its config file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flash import __version__
from flash.cli.output import globals_of, note, say, say_json
from flash.client import local_server, settings

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def server() -> None:
    """Start, stop and inspect the server of this home."""


@app.command()
def start(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Run a team's server by this file, in this process.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether the file is sound.")] = False,
) -> None:
    """Start the local server, unless it runs already; or with --config run a team's."""
    if config is not None:
        # In place of this process, so that signals and exit codes are the server's own.
        command = [sys.executable, "-P", "-m", local_server.SERVER_MODULE, "--config", str(config)]
        if not check:
            os.execv(command[0], command)
        done = subprocess.run([*command, "--check"], check=False)
        if done.returncode:
            raise typer.Exit(done.returncode)
        _answer(ctx, {"sound": True, "config": str(config)}, f"{config} is sound")
        return
    home = settings.flash_home()
    before = local_server.running(home)
    found = local_server.ensure(home, notice=note)
    word = "runs already" if before and before[0].pid == found.pid else "started"
    _answer(ctx, _described(found), f"{word}: {found.base_url} (pid {found.pid}, log {local_server.log_path(home)})")


@app.command()
def stop(ctx: typer.Context) -> None:
    """Stop the local server; runs under way go on and are taken up when it starts again."""
    pid = local_server.stop(settings.flash_home())
    _answer(ctx, {"stopped": pid is not None, "pid": pid}, f"stopped (pid {pid})" if pid else "it was not running")


@app.command()
def status(ctx: typer.Context) -> None:
    """Say where the local server is and what it runs on."""
    home = settings.flash_home()
    found = local_server.running(home)
    if found is None:
        _answer(ctx, {"running": False, "home": str(home)}, f"not running (home {home})")
        return
    server, health = found
    document = {**_described(server), "version": health.version, "sqlite_version": health.sqlite_version}
    other = "" if health.version == __version__ else f" (this command is {__version__})"
    lines = [
        f"running at {server.base_url}",
        f"  pid      {server.pid}",
        f"  version  {health.version}{other}",
        f"  SQLite   {health.sqlite_version}",
        f"  home     {home}",
        f"  log      {local_server.log_path(home)}",
    ]
    _answer(ctx, {**document, "home": str(home)}, "\n".join(lines))


def _described(server: local_server.LocalServer) -> dict[str, Any]:
    return {"running": True, "base_url": server.base_url, "pid": server.pid, "version": server.version}


def _answer(ctx: typer.Context, document: dict[str, Any], text: str) -> None:
    if globals_of(ctx).json:
        say_json(document)
    else:
        say(text)
