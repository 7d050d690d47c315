"""`flash admin`: orgs, keys and the audit log of a team's server.

Asks the server that the other commands ask, as an admin or its owner; with `--config`, on the server's own machine,
it acts on the database itself, which is how the first key is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash.cli.connection import connect
from flash.cli.output import globals_of, note, say, say_json

if TYPE_CHECKING:
    from flash.client.admin import AdminClient
    from flash.control_plane.administering import OnTheMachine

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
org = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
key = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
app.add_typer(org, name="org", help="Make, list and revoke organisations.")
app.add_typer(key, name="key", help="Make, list and revoke API keys.")

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The server's own config: act on its database, no server needed."),
]
OfOrg = Annotated[str | None, typer.Option("--org", metavar="NAME", help="The organisation; your own if left out.")]


@app.callback()
def admin() -> None:
    """See to a team's organisations, keys and audit log."""


@contextmanager
def _administration(config: Path | None) -> Iterator[AdminClient | OnTheMachine]:
    if config is None:
        from flash.client.admin import AdminClient

        found: AdminClient | OnTheMachine = AdminClient(connect())
    else:
        from flash.control_plane.administering import OnTheMachine

        found = OnTheMachine(config)
    try:
        yield found
    finally:
        found.close()


# --- orgs -------------------------------------------------------------------------------------------------


@org.command("create")
def create_org(ctx: typer.Context, name: str, config: Config = None) -> None:
    """Make an organisation. Its name is the namespace of its environments."""
    with _administration(config) as there:
        made = there.create_org(name)
        there.note("org create", name)
    hint = f"its first key: flash admin key create --org {name} --name WHO --role admin"
    _answer(ctx, made.model_dump(mode="json"), [f"made {made.name}; {hint}"])


@org.command("list")
def list_orgs(ctx: typer.Context, config: Config = None) -> None:
    """List the organisations."""
    with _administration(config) as there:
        found = there.orgs()
    document = {"orgs": [each.model_dump(mode="json") for each in found]}
    rows = [
        f"{each.name}{'' if each.share == 1 else f'  share {each.share:g}'}{'  revoked' if each.revoked_at else ''}"
        for each in found
    ]
    _answer(ctx, document, rows)


@org.command("share")
def set_share(
    ctx: typer.Context,
    name: str,
    share: Annotated[float, typer.Argument(metavar="SHARE", min=0.01, max=100, help="1 is the usual one.")],
    config: Config = None,
) -> None:
    """Set an organisation's share of scarce devices, beside the others'."""
    with _administration(config) as there:
        changed = there.set_share(name, share)
        there.note("org share", f"org={name} share={share:g}")
    _answer(ctx, changed.model_dump(mode="json"), [f"{changed.name} has a share of {changed.share:g}"])


@org.command("revoke")
def revoke_org(ctx: typer.Context, name: str, config: Config = None) -> None:
    """Revoke all keys of an organisation and cancel its runs. What it has stays."""
    with _administration(config) as there:
        revoked = there.revoke_org(name)
        there.note("org revoke", name)
    _answer(ctx, revoked.model_dump(mode="json"), [f"revoked {name}: its keys are void and its runs are cancelled"])


# --- keys -------------------------------------------------------------------------------------------------


@key.command("create")
def create_key(
    ctx: typer.Context,
    name: Annotated[str, typer.Option("--name", help="What to call it, e.g. a person or a machine.")],
    org: OfOrg = None,
    role: Annotated[str, typer.Option("--role", help="read-only, member, admin or owner.")] = "member",
    max_usd: Annotated[float | None, typer.Option("--max-usd", min=0, help="What its runs may cost in all.")] = None,
    max_runs: Annotated[int | None, typer.Option("--max-runs", min=0, help="Its unfinished runs at once.")] = None,
    max_gpus: Annotated[int | None, typer.Option("--max-gpus", min=0, help="GPUs of its unfinished runs.")] = None,
    config: Config = None,
) -> None:
    """Make an API key. It is shown this once; the server keeps only its digest."""
    from flash.records import KeyRequest

    request = KeyRequest(name=name, role=role, org=org, max_usd=max_usd, max_runs=max_runs, max_gpus=max_gpus)
    with _administration(config) as there:
        made = there.create_key(request)
        there.note("key create", f"key={made.key.id} org={made.key.org} role={made.key.role}")
    if not globals_of(ctx).json:
        note(f"{made.key.id}: {made.key.role} of {made.key.org}; the key itself, which nobody can show again:")
    _answer(ctx, {"key": made.key.model_dump(mode="json"), "secret": made.secret}, [made.secret])


@key.command("list")
def list_keys(ctx: typer.Context, org: OfOrg = None, config: Config = None) -> None:
    """List API keys, without the keys themselves."""
    with _administration(config) as there:
        found = there.keys(org)
    rows = [
        f"{each.id}  {each.org}  {each.role}  {each.name}{_caps(each)}{'  revoked' if each.revoked_at else ''}"
        for each in found
    ]
    _answer(ctx, {"keys": [each.model_dump(mode="json") for each in found]}, rows)


@key.command("revoke")
def revoke_key(
    ctx: typer.Context,
    which: Annotated[str, typer.Argument(metavar="KEY", help="Its id, or with --org its name.")],
    org: OfOrg = None,
    config: Config = None,
) -> None:
    """Revoke an API key at once. Its runs go on."""
    with _administration(config) as there:
        revoked = there.revoke_key(which, org)
        there.note("key revoke", f"key={revoked.id} org={revoked.org}")
    _answer(ctx, revoked.model_dump(mode="json"), [f"revoked {revoked.id} ({revoked.name} of {revoked.org})"])


def _caps(found: Any) -> str:
    caps = [("$", found.max_usd, ""), ("", found.max_runs, " runs"), ("", found.max_gpus, " GPUs")]
    said = [f"{before}{value:g}{after}" for before, value, after in caps if value is not None]
    return f"  at most {', '.join(said)}" if said else ""


# --- the audit log ----------------------------------------------------------------------------------------


@app.command("audit")
def audit(
    ctx: typer.Context,
    org: OfOrg = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many entries.")] = 50,
    before: Annotated[int | None, typer.Option("--before", metavar="ID", help="Only older ones than this.")] = None,
    config: Config = None,
) -> None:
    """Show who did, or tried, what; newest first."""
    with _administration(config) as there:
        found = there.audit(org, limit, before)
    rows = []
    for each in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each.time))
        who = each.name or each.actor
        parts = [f"{each.id}  {when}Z  {each.status}  {each.org or '-'}  {who}  {each.address or '-'}  {each.action}"]
        rows.append("  ".join([*parts, *(part for part in (each.object, each.message) if part)]))
    _answer(ctx, {"entries": [each.model_dump(mode="json") for each in found]}, rows)


def _answer(ctx: typer.Context, document: dict[str, Any], lines: list[str]) -> None:
    if globals_of(ctx).json:
        say_json(document)
        return
    for line in lines:
        say(line)
