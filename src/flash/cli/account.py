"""`flash login`, `whoami` and `version`: which server, and who the caller is to it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flash import __version__
from flash.cli.connection import connect
from flash.cli.output import globals_of, say, say_json
from flash.client import settings
from flash.client.client import FlashClient
from flash.errors import InvalidInput

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def login(
    ctx: typer.Context,
    api_url: Annotated[
        str | None, typer.Option("--api-url", envvar=settings.API_URL, help="The server's address.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar=settings.API_KEY, help="Your key; asked for when left out."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Forget the saved server; use the local one.")] = False,
) -> None:
    """Save a team server's address and your key.

    The local server needs no login.
    """
    home = settings.flash_home()
    if local:
        had = settings.forget_login(home)
        _answer(ctx, {"server": "local"}, "back to the local server" if had else "nothing was saved")
        return
    if not api_url:
        raise InvalidInput(
            "no server named; the local one needs no login",
            remedy="for a team server: flash login --api-url https://...",
        )
    url = settings.normalise_url(api_url)
    key = (api_key or _ask_for_key()).strip()
    if not key:
        raise InvalidInput("the key is empty", remedy=f"pass it with --api-key or {settings.API_KEY}")
    with FlashClient(url, key, unreachable_remedy="check --api-url") as client:
        who = client.whoami()
    path = settings.save_login(home, url, key)
    _answer(
        ctx,
        {"server": url, "org": who.org, "role": who.role},
        f"logged in to {url} as {who.org} ({who.role}); saved in {path}",
    )


@app.command()
def whoami(ctx: typer.Context) -> None:
    """Show the server and who you are to it."""
    with connect() as client:
        who = client.whoami()
        _answer(
            ctx,
            {"org": who.org, "role": who.role, "server": client.base_url},
            f"{who.org} ({who.role}) at {client.base_url}",
        )


@app.command()
def version(ctx: typer.Context) -> None:
    """Show Flash's version."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    _answer(ctx, {"version": __version__, "python": python}, f"flash {__version__} (Python {python})")


def _ask_for_key() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    return str(typer.prompt("API key", hide_input=True, err=True))


def _answer(ctx: typer.Context, document: dict[str, str], line: str) -> None:
    if globals_of(ctx).json:
        say_json(document)
    else:
        say(line)
