"""`flash`: the root command, its table of commands, and what becomes of an error.

Owns which command lives where. A command's module is imported when it is called, so that `--help` costs
nothing; the table repeats each one-line help for that reason, and a test holds both equal.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flash import __version__
from flash.cli.output import FAILED, INTERRUPTED, Globals, globals_of, report

# httpx brings a command line of its own along, with a terminal library that takes longer to import than all the rest of
# it; it does without where that can't be imported.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Entry:
    module: str
    help: str
    section: str
    is_group: bool = False  # the module's whole app, rather than one command of it


TRAINING, SERVING, ENVIRONMENTS, SERVICE = "Train", "Serve", "Environments and models", "Service"

COMMANDS = {
    "train": Entry("flash.cli.train", "Train an adapter from a config.", TRAINING),
    "runs": Entry("flash.cli.runs", "List runs, newest first.", TRAINING),
    "status": Entry("flash.cli.runs", "Show a run: what happened and what comes next.", TRAINING),
    "log": Entry("flash.cli.runs", "Print a run's log.", TRAINING),
    "samples": Entry("flash.cli.runs", "Print the completions that a run recorded.", TRAINING),
    "profile": Entry("flash.cli.profile", "Write where a run's time went as a trace, and sum it up.", TRAINING),
    "cancel": Entry("flash.cli.runs", "Cancel a run; its checkpoints stay.", TRAINING),
    "retry": Entry("flash.cli.retry", "Go on from where a failed or cancelled run stopped.", TRAINING),
    "priority": Entry("flash.cli.runs", "Move a queued run up or down among your organisation's.", TRAINING),
    "checkpoints": Entry("flash.cli.runs", "List a run's checkpoints.", TRAINING),
    "keep": Entry("flash.cli.keep", "Keep a run's files for good, or for some days.", TRAINING),
    "export": Entry("flash.cli.export", "Copy an adapter out of the server.", TRAINING),
    "deploy": Entry("flash.cli.deploy", "Serve an adapter behind an OpenAI-compatible API.", SERVING),
    "chat": Entry("flash.cli.chat", "Ask a deployed run.", SERVING),
    "deployments": Entry("flash.cli.deploy", "List what is deployed.", SERVING),
    "undeploy": Entry("flash.cli.deploy", "Take a run's name back; its adapters stay.", SERVING),
    "engine": Entry("flash.cli.engine", "Install and list inference engines.", SERVING, True),
    "env": Entry("flash.cli.environments", "Write, check and publish environments.", ENVIRONMENTS, True),
    "models": Entry("flash.cli.models", "List the base models.", ENVIRONMENTS),
    "gpus": Entry("flash.cli.hardware", "List hardware with memory and price.", ENVIRONMENTS),
    "config": Entry("flash.cli.configuration", "Describe the training config.", ENVIRONMENTS, True),
    "dashboard": Entry("flash.cli.dashboard", "Open the dashboard in a browser.", SERVICE),
    "server": Entry("flash.cli.server", "Start, stop and inspect the server of this home.", SERVICE, True),
    "admin": Entry("flash.cli.admin", "See to a team's organisations, keys and audit log.", SERVICE, True),
    "login": Entry("flash.cli.account", "Save a team server's address and your key.", SERVICE),
    "whoami": Entry("flash.cli.account", "Show the server and who you are to it.", SERVICE),
    "version": Entry("flash.cli.account", "Show Flash's version.", SERVICE),
}


class LazyCommands(MutableMapping[str, Any]):
    """The commands by name, each imported when it is looked up."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = load_command(name, COMMANDS[name])
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are fixed")

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def load_command(name: str, entry: Entry) -> Any:
    """The command as Typer builds it, with the global options added to it or to each of its subcommands."""
    command: Any = typer.main.get_command(importlib.import_module(entry.module).app)
    if not entry.is_group and hasattr(command, "commands"):
        command = command.commands[name]
    common = typer.main.get_command(_common).params
    for each in _leaves(command):
        each.params.extend(common)
    return command


def _leaves(command: Any) -> Iterator[Any]:
    """The commands that do something: itself, or all below it."""
    if not hasattr(command, "commands"):
        yield command
        return
    for each in command.commands.values():
        yield from _leaves(each)


class Root(TyperGroup):
    """The root command: lists without importing, and turns errors into one line and an exit code."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            with formatter.section(section):
                rows = [(name, entry.help) for name, entry in COMMANDS.items() if entry.section == section]
                formatter.write_dl(rows)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.commands.get(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Abort:  # Ctrl-C or end of input at a prompt
            raise typer.Exit(INTERRUPTED) from None

    def main(self, *arguments: Any, **options: Any) -> Any:
        settings = Globals()
        options.setdefault("obj", settings)
        try:
            return super().main(*arguments, **options)
        except Exception as error:  # the outermost boundary: nothing may reach a person as a traceback
            report(error, debug=settings.debug, verbose=settings.verbose)
            sys.exit(FAILED)


def _set_json(ctx: typer.Context, value: bool) -> None:
    globals_of(ctx).json |= value


def _set_debug(ctx: typer.Context, value: bool) -> None:
    globals_of(ctx).debug |= value


def _set_verbose(ctx: typer.Context, value: bool) -> None:
    globals_of(ctx).verbose |= value


def _show_version(value: bool) -> None:
    if value:
        print(f"flash {__version__}")
        raise typer.Exit


def _eager(*names: str, help: str, callback: Any) -> Any:
    return typer.Option(*names, help=help, callback=callback, is_eager=True, expose_value=False)


Json = Annotated[bool, _eager("--json", help="Print JSON.", callback=_set_json)]
Debug = Annotated[bool, _eager("--debug", help="Show tracebacks.", callback=_set_debug)]
Verbose = Annotated[bool, _eager("--verbose", "-v", help="Say more.", callback=_set_verbose)]
Version = Annotated[bool, _eager("--version", "-V", help="Show the version and exit.", callback=_show_version)]

_common = typer.Typer(add_completion=False)


@_common.command()
def _options(json: Json = False, debug: Debug = False, verbose: Verbose = False) -> None:
    """Never called: its parameters are the global options."""


app = typer.Typer(
    cls=Root, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@app.callback()
def root(version: Version = False, json: Json = False, debug: Debug = False, verbose: Verbose = False) -> None:
    """Flash: an environment and a short TOML in, a trained adapter out."""


def main() -> None:
    """The console script."""
    try:
        app(prog_name="flash")
    except KeyboardInterrupt:  # outside any command, e.g. while a module is imported
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
