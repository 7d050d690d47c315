"""`flash env`: write, check and publish environments.

Owns the words around packages; what ships, what is safe to open and what a check finds is decided in
`flash.environments`.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash.catalog.catalog import load_catalog
from flash.cli.connection import connect
from flash.cli.output import FAILED, Globals, globals_of, note, say, say_json
from flash.cli.preview import Preview, can_preview
from flash.config.load import load_config
from flash.config.recipes import resolve
from flash.config.secrets import resolve_secrets
from flash.environments.package import Package, pack, slug, unpack
from flash.environments.scaffold import CONFIG_FILE, write_scaffold
from flash.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from flash.environments.checking import CheckReport

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

_ID = re.compile(r"[a-z0-9._-]+/[a-z0-9._-]+")
NANO = "flash/nano"
SHOWN_FILES = 12
SHOWN_CHARACTERS = 1000
VERSION_DIGITS = 12

EnvironmentId = Annotated[str, typer.Argument(metavar="ID", help="namespace/name, as `flash env list` shows it.")]
PackagePath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A folder with environment.py, or one .py file.", show_default=False)
]


@app.callback()
def env() -> None:
    """Write, check and publish environments."""


@app.command()
def setup(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder to write into.", show_default=False)] = Path(
        "my-environment"
    ),
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Its name; by default the folder's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a small environment that works, to start from."""
    files = write_scaffold(path, name, force=force)
    if globals_of(ctx).json:
        say_json({"folder": str(path.resolve()), "files": list(files)})
        return
    say(f"wrote {len(files)} files into {path}: {', '.join(files)}")
    chosen = slug(name or path.resolve().name)
    say(f"Next: flash env check {path}, then flash env push --name {chosen} {path}")
    say(f"and flash train {path / CONFIG_FILE}")


@app.command()
def check(
    ctx: typer.Context,
    path: PackagePath = Path(),
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Take params, secrets and worker_env from this config."),
    ] = None,
) -> None:
    """Run an environment here as a run would meet it: import, rows, prompts, the gold answers' scores."""
    from flash.environments.checking import check as run_check  # it imports the SDK, which `push` need not

    asked = _asked(config)
    options = globals_of(ctx)
    preview = _preview(asked)
    try:
        report = run_check(path, asked.params, render=preview.render if preview else None)
    finally:
        if preview is not None:
            preview.close()
    if preview is None:
        report.warnings.append("prompts were not rendered: that needs `pip install 'flash-lora[train]'`")
    elif preview.truncated:
        report.warnings.append(f"{preview.truncated} of the rows looked at are longer than {asked.max_length} tokens")
    if options.json:
        say_json({"ok": report.ok, **asdict(report)})
    else:
        _show_check(report, options)
    if options.debug:
        for detail in report.details:
            note(detail.rstrip())
    for problem in dict.fromkeys(report.problems):
        note(f"error: {' '.join(problem.split())}")
    if not report.ok:
        if report.details and not options.debug:
            note("(--debug shows the traceback)")
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class _Asked:
    """What a run of this config would ask of the environment; without a config, `flash/nano`'s defaults."""

    model: str = NANO
    thinking: bool = False
    max_length: int | None = None
    params: dict[str, Any] = field(default_factory=dict)


def _asked(config: Path | None) -> _Asked:
    """Reads the config; its secrets and flags go into this process, where user code runs."""
    if config is None:
        return _Asked()
    loaded = load_config(config).config
    spec = resolve(loaded)
    os.environ.update(resolve_secrets(loaded, config.resolve().parent))
    os.environ.update(loaded.worker_env)
    return _Asked(spec.model, spec.thinking, spec.train.max_length, loaded.environment.params)


def _preview(asked: _Asked) -> Preview | None:
    if not can_preview():
        return None
    return Preview(load_catalog().get(asked.model), thinking=asked.thinking, max_length=asked.max_length)


def _show_check(report: CheckReport, options: Globals) -> None:
    if report.files:
        say(f"package: {len(report.files)} files, {report.size / 1000:,.1f} kB")
    if report.splits:
        rows = ", ".join(f"{split} {count:,}" for split, count in report.splits.items())
        say(f"rows: {rows}" + ("; multi-turn" if report.multi_turn else ""))
    if report.rendered:
        say("the first row as it is trained, trained part between ⟦ and ⟧:")
        _say_indented(report.rendered, options)
    for title, messages in (("prompt of the first row", report.prompt), ("its gold answer", report.completion)):
        if messages and not report.rendered:
            say(f"{title}:")
            for message in messages:
                _say_indented(f"[{message.get('role')}] {message.get('content') or ''}", options)
    if gold := report.gold:
        empty = "" if gold.empty_answer is None else f"; an empty answer scores {gold.empty_answer:g}"
        say(f"gold answers: mean score {gold.mean:.3f} over {gold.scored} rows{empty}")
    for text in report.warnings:
        note(f"warning: {text}")
    if report.ok:
        say("ok")


def _say_indented(text: str, options: Globals) -> None:
    shown = text if options.verbose or len(text) <= SHOWN_CHARACTERS else _cut(text)
    say("\n".join(f"  {line}" for line in shown.splitlines()))


def _cut(text: str) -> str:
    return f"{text[:SHOWN_CHARACTERS]}… ({len(text) - SHOWN_CHARACTERS:,} more characters; -v shows them)"


@app.command()
def push(
    ctx: typer.Context,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Its name, or namespace/name.")],
    path: PackagePath = Path(),
) -> None:
    """Publish an environment.

    Reads the code but never runs it. The same content again gives the same version.
    """
    options = globals_of(ctx)
    package = pack(path)
    with connect() as client:
        namespace, name = _target(name, client.whoami().org)
        version = client.push_environment(namespace, name, package.data)
    pinned = f"{version.id}@{version.sha256[:VERSION_DIGITS]}"
    if options.json:
        say_json(
            {
                **version.model_dump(mode="json"),
                "id": version.id,
                "pinned": pinned,
                "left_out": list(package.left_out),
                "warnings": list(package.notes),
            }
        )
        return
    _describe(package, options)
    say(f"pushed {pinned}")
    say(f'Next: write id = "{version.id}" under [environment] of a config, then: flash train CONFIG')


@app.command()
def pull(
    ctx: typer.Context,
    environment_id: EnvironmentId,
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="The folder to write; by default its name.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="The same as PATH.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite files that are there.")] = False,
) -> None:
    """Copy a published environment into a folder."""
    namespace, name = _parse_id(environment_id)
    if path is not None and output is not None and path != output:
        raise InvalidInput("two folders named", remedy="give PATH or --output, not both")
    folder = output or path or Path(name)
    if not force and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} exists", remedy="-f overwrites its files; -o writes to another folder")
    with connect() as client:
        archive = client.environment_archive(namespace, name)
    files = unpack(archive, folder, overwrite=force)
    if globals_of(ctx).json:
        say_json({"id": environment_id, "output": str(folder.resolve()), "files": list(files)})
    else:
        say(f"{environment_id}: {len(files)} files in {folder}")


@app.command("list")
def list_(ctx: typer.Context) -> None:
    """List the published environments."""
    options = globals_of(ctx)
    with connect() as client:
        found = client.environments()
    if options.json:
        say_json({"environments": [{"id": each.id, **each.model_dump(mode="json")} for each in found]})
    elif options.human():
        from flash.cli.render import print_environments

        print_environments(found)
    else:
        for each in found:
            say(f"{each.id} {each.sha256[:VERSION_DIGITS]}")


@app.command()
def delete(
    ctx: typer.Context,
    environment_id: EnvironmentId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a published environment, every version of it."""
    namespace, name = _parse_id(environment_id)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInput(f"{environment_id} was not deleted: there is no terminal to ask", remedy="pass -y")
        if not typer.confirm(f"Delete {environment_id}, every version of it?", err=True):
            note("nothing was deleted")
            raise typer.Exit(FAILED)
    with connect() as client:
        client.delete_environment(namespace, name)
    if globals_of(ctx).json:
        say_json({"id": environment_id, "deleted": True})
    else:
        say(f"deleted {environment_id}")


def _target(name: str, org: str) -> tuple[str, str]:
    """Namespace and slugged name; a namespace that is written out must be the caller's own."""
    namespace, slash, rest = name.rpartition("/")
    if slash and namespace != org:
        raise InvalidInput(f"--name {name!r}: the namespace must be your org's, {org!r}", remedy=f"--name {rest}")
    return org, slug(rest)


def _parse_id(text: str) -> tuple[str, str]:
    namespace, _, name = text.partition("/")
    if not _ID.fullmatch(text) or {namespace, name} & {".", ".."}:
        raise InvalidInput(
            f"{text!r} is not a lower-case namespace/name", remedy="flash env list shows the published ones"
        )
    return namespace, name


def _describe(package: Package, options: Globals) -> None:
    names = list(package.files)
    shown = names if options.verbose else names[:SHOWN_FILES]
    more = f" and {len(names) - len(shown)} more (-v lists all)" if len(names) > len(shown) else ""
    say(f"ships {len(names)} files, {package.size / 1000:,.1f} kB: {', '.join(shown)}{more}")
    if package.left_out:
        say(f"left out: {', '.join(package.left_out)}")
    for text in package.notes:
        note(f"warning: {text}")
