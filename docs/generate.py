"""Writes what is generated in `docs/`: whole pages, marked parts of others, and pictures of what was measured.

Run it by `make docs`; `--check` writes nothing and exits with 1 if a page is stale. A part stands between
`<!-- generated: NAME -->` and `<!-- end -->`; the rest of its page is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import layout_table
import measured
import messages
import server_settings
from typer.testing import CliRunner

from flash.catalog.catalog import PACKAGE_FOLDER, load_catalog
from flash.cli.main import COMMANDS, app, load_command
from flash.config.load import parse_config
from flash.config.reference import markdown
from flash.errors import ConfigError

FOLDER = Path(__file__).resolve().parent
_PART = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


# --- the command line -----------------------------------------------------------------------------------


def command_line() -> str:
    """The whole page: the `--help` of every command."""
    return "\n".join(_command_line()) + "\n"


def _command_line() -> Iterator[str]:
    yield "<!-- Generated from `--help` by `make docs`. -->"
    yield "# Command line"
    yield ""
    yield (
        "`--json`, `--debug` and `--verbose` work before and after a command. What you asked for goes to stdout, "
        "everything else to stderr. When stdout is no terminal, tables become plain lines, and `flash status` "
        "prints JSON."
    )
    yield ""
    yield "| exit code | meaning |"
    yield "| --- | --- |"
    yield "| 0 | it worked; when following a run: it ended `done` |"
    yield "| 1 | it did not: one line on stderr for each problem, and `--debug` shows the traceback |"
    yield "| 2 | the command line was not understood |"
    yield "| 130 | Ctrl-C; when following a run, the run itself goes on |"
    yield ""
    yield from _help([])
    for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
        yield f"## {section}"
        yield ""
        for name, entry in COMMANDS.items():
            if entry.section == section:
                yield from _helps([name], load_command(name, entry))


def _helps(words: list[str], command: Any) -> Iterator[str]:
    """The command's help, and then that of every one below it."""
    yield from _help(words)
    for name, below in getattr(command, "commands", {}).items():
        yield from _helps([*words, name], below)


def _help(words: list[str]) -> Iterator[str]:
    asked = CliRunner().invoke(app, [*words, "--help"], prog_name="flash", terminal_width=100, color=False)
    if words:
        yield f"### flash {' '.join(words)}"
        yield ""
    yield "```text"
    yield "\n".join(line.rstrip() for line in asked.stdout.strip("\n").splitlines())
    yield "```"
    yield ""


# --- models -----------------------------------------------------------------------------------------------


def model_table() -> str:
    lines = ["| model | size | layout | context | thinking | rank cap | licence |", "|---|---|---|---|---|---|---|"]
    for entry in load_catalog(home=Path("/nowhere")):  # what ships, without anyone's own entries
        thinks = "yes" if entry.thinking else "no"
        lines.append(
            f"| `{entry.id}` | {entry.size} | {entry.layout} | {entry.context:,} | {thinks} | {entry.rank_cap} "
            f"| {entry.licence or '–'} |"
        )
    return "\n".join(lines)


def model_form() -> str:
    """The explanation of an entry's keys, from the head of the shipped catalog."""
    head = (PACKAGE_FOLDER / "models.toml").read_text(encoding="utf-8").split("\n\n")[0]
    keys = [line.removeprefix("#").removeprefix(" ") for line in head.splitlines()]
    start = next(place for place, line in enumerate(keys) if line.startswith("id "))
    end = keys.index("", start) if "" in keys[start:] else len(keys)
    return "\n".join(["```text", *keys[start:end], "```"])


# --- troubleshooting --------------------------------------------------------------------------------------

FAULTY_CONFIGS = (
    {"model": "flash/nano"},
    {"model": "flash/nanno", "environment": {"id": "local/task"}},
    {"model": "flash/nano", "environment": {"id": "./my-task"}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "train": {"epoch": 3}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "train": {"epochs": "3"}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "train": {"batch_size": 0}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "train": {"lora_rank": 512}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "train": {"init_from_adapter": "latest"}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "sft": {"epochs": 3}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "train": {"seed": 1}},
    {"model": "flash/nano", "environment": {"id": "local/task", "secrets": ["HF_TOKEN"]}},
    {"model": "flash/nano", "environment": {"id": "local/task"}, "worker_env": {"API_KEY": "x"}},
)


def config_errors() -> str:
    """What real faulty configs are told."""
    lines = []
    for tables in FAULTY_CONFIGS:
        try:
            parse_config(tables, catalog=load_catalog(home=Path("/nowhere")))
        except ConfigError as error:
            lines += error.problems
        else:
            raise AssertionError(f"{tables} is sound")
    return "\n".join(["```text", *(f"error: {line}" for line in lines), "```"])


def error_table(code: str) -> str:
    found = [message for message in messages.error_messages() if message.code == code]
    if not found:
        return "Messages of this kind say what to do in the sentence itself."
    rows = [f"| {_cell(message.text)} | {_cell(message.remedy or '')} |" for message in found]
    return "\n".join(["| message | what to do |", "| --- | --- |", *rows])


def warning_table() -> str:
    lines = ["| warning | text |", "| --- | --- |"]
    for code, group in groupby(messages.warnings(), key=lambda message: message.code):
        lines.append(f"| `{code}` | {'<br>'.join(_cell(message.text) for message in group)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Plain text as one cell: what Markdown would read as a mark is written out."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
    return "".join(part if place % 2 else _plain(part) for place, part in enumerate(re.split(r"(`[^`]*`)", escaped)))


def _plain(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", text)


# --- pages ------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "model-table": model_table,
    "model-form": model_form,
    "layout-table": layout_table.table,
    "config-errors": config_errors,
    "warnings": warning_table,
    "profile-sft": lambda: measured.profile_table("sft"),
    "profile-grpo": lambda: measured.profile_table("grpo"),
    "levers": measured.lever_table,
    **{
        f"errors-{code.replace('_', '-')}": lambda code=code: error_table(code)  # type: ignore[misc]
        for code in sorted(set(messages.codes().values()))
    },
}


def filled(page: str) -> str:
    """The page as it is, with its generated parts made anew."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    return _PART.sub(lambda part: f"{part[1]}{PARTS[part['name']]()}\n{part[3]}", text)


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": markdown,
    "cli.md": command_line,
    "server.md": server_settings.page,
    "benchmarks.md": measured.benchmark_page,
    "models.md": lambda: filled("models.md"),
    "performance.md": lambda: filled("performance.md"),
    "troubleshooting.md": lambda: filled("troubleshooting.md"),
}


def main(*, check: bool) -> int:
    """Writes the pages and pictures that have changed, or only names them; the exit code."""
    stale = 0
    made = {name: render() for name, render in PAGES.items()}
    made |= {f"images/{name}": picture for name, picture in measured.images().items()}
    for name, text in made.items():
        path = FOLDER / name
        if not path.exists() or text != path.read_text(encoding="utf-8"):
            stale += 1
            print(f"docs/{name}{' is stale: run `make docs`' if check else ''}")
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
