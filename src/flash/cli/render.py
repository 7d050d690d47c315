"""Tables and the live display, for terminals only. Rich is imported here and nowhere else in the CLI.

Owns how things look. Every function takes data that some command already has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flash.catalog.catalog import ModelEntry
from flash.catalog.fit import gigabytes
from flash.cli.progress import Progress, duration, evaluation_text, headline, step_text
from flash.errors import from_wire
from flash.records import Checkpoint, Deployment, EnvironmentVersion, Phase, RunState, RunStatus, RunSummary

STATE_STYLES = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
SHOWN_WARNINGS = 3
BAR_WIDTH = 24


def print_dry_run(document: Mapping[str, Any]) -> None:
    """The resolved spec, a row a key; what the user left out is marked."""
    spec = dict(document["spec"])
    defaulted = set(spec.pop("defaulted", ()))
    recipe = spec.pop("recipe", {})
    table = _table("key", "value", "")
    table.columns[1].no_wrap = False  # a long value wraps; none is cut
    for key, value in flatten(spec):
        if value is not None:
            table.add_row(key, escape(_value(value)), "[dim]default[/dim]" if key in defaulted else "")
    table.add_section()
    for key, value in flatten({"recipe": recipe}):
        if value is not None:
            table.add_row(f"[dim]{key}[/dim]", f"[dim]{escape(_value(value))}[/dim]", "[dim]recipe[/dim]")
    console = _console()
    _print_table(console, table)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    console.print("Nothing was submitted.")


def print_runs(runs: Sequence[RunSummary]) -> None:
    console = _console()
    if not runs:
        console.print("No runs yet. Start one: flash train CONFIG")
        return
    table = _table("run", "state", "step", "by", "model", "environment", "age")
    now = time.time()
    for run in runs:
        total = f"/{run.total_steps}" if run.total_steps else ""
        table.add_row(
            run.run_id,
            _state(run.state),
            f"{run.step}{total}",
            run.algorithm,
            escape(run.model),
            escape(run.environment),
            age(now - run.created_at),
        )
    _print_table(console, table)


def print_status(run: RunStatus, *, verbose: bool) -> None:
    console = _console()
    console.print(f"[bold]{run.run_id}[/bold]  {_state(run.state)}")
    console.print(escape(run.summary), soft_wrap=True)
    if run.next:
        console.print(f"Next: {escape(run.next)}", soft_wrap=True)
    console.print()
    table = Table.grid(padding=(0, 2))
    for name, value in _facts(run):
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    console.print(table)
    for warning in run.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    if run.error:
        console.print(f"[red]error:[/red] {escape(str(from_wire(run.error)))}", soft_wrap=True)
        if detail := run.error.get("detail"):
            shown = detail if verbose else "\n".join(str(detail).rstrip().splitlines()[-6:])
            console.print(Text(shown.rstrip(), style="dim"))
            if shown != detail:
                console.print(f"[dim]in full: flash status {run.run_id} -v[/dim]")


def print_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    console = _console()
    if not checkpoints:
        console.print("No checkpoints yet.")
        return
    table = _table("step", "reference", "age", "")
    now = time.time()
    for each in checkpoints:
        marks = [word for word, holds in (("final", each.final), ("optimizer state kept", each.has_state)) if holds]
        table.add_row(str(each.step), each.ref, age(now - each.created_at), f"[dim]{', '.join(marks)}[/dim]")
    _print_table(console, table)


def print_deployments(deployments: Sequence[Deployment], base_url: str) -> None:
    console = _console()
    if not deployments:
        console.print("Nothing is deployed. Deploy a run: flash deploy RUN_ID")
        return
    table = _table("model", "live", "base", "engine", "since")
    now = time.time()
    for each in deployments:
        engine = each.engine
        where = f"{engine.state}{f' on {engine.device}' if engine.device else ''}" if engine else "idle"
        table.add_row(each.run_id, f"step {each.step}", escape(each.model), where, f"{age(now - each.deployed_at)} ago")
    _print_table(console, table)
    console.print(f"[dim]base_url {escape(base_url)}[/dim]", soft_wrap=True)


def print_models(entries: Sequence[ModelEntry]) -> None:
    console = _console()
    table = _table("model", "size", "layout", "context", "thinking", "rank cap")
    for entry in entries:
        thinks = "yes" if entry.thinking else "no"
        table.add_row(escape(entry.id), entry.size, entry.layout, f"{entry.context:,}", thinks, str(entry.rank_cap))
    _print_table(console, table)
    for entry in entries:
        if entry.note:
            console.print(f"[dim]{escape(entry.id)}: {escape(entry.note)}[/dim]", soft_wrap=True)


def print_cost(document: Mapping[str, Any]) -> None:
    """The estimate with its parts, what else the run would fit on, and what was assumed."""
    console = _console()
    found = document["estimate"]
    sampling = f" (sampling {_seconds(found['sampling_s'])})" if found["sampling_s"] else ""
    shares = found["memory_parts"].items()
    table = _table("estimate", "")
    for name, value in (
        ("run", f"{document['algorithm']} on {document['model']}"),
        ("hardware", f"{found['hardware']}, ${found['usd_per_hour']:.2f} an hour"),
        ("price", f"${found['usd']:.2f}"),
        ("wall-clock", duration(found["wall_clock_s"])),
        ("  start", _seconds(found["start_s"])),
        ("  steps", f"{found['steps']:,} of {_seconds(found['seconds_per_step'])} each{sampling}"),
        ("  evaluation", _seconds(found["evaluation_s"])),
        ("tokens a step", f"{found['tokens_per_step']:,}, {found['micro_batch_tokens']:,} at once"),
        ("memory", f"{gigabytes(found['memory_bytes'])} of {gigabytes(found['hardware_memory_bytes'])}"),
        *((f"  {name}", gigabytes(size)) for name, size in shares if size),
    ):
        table.add_row(f"[dim]{escape(name)}[/dim]", escape(value))
    _print_table(console, table)
    if document["alternatives"]:
        console.print()
        others = _table("also fits", "price", "wall-clock", "$/hour")
        for each in document["alternatives"]:
            price, hourly = f"${each['usd']:.2f}", f"{each['usd_per_hour']:.2f}"
            others.add_row(escape(each["hardware"]), price, duration(each["wall_clock_s"]), hourly)
        _print_table(console, others)
    for line in found["assumptions"]:
        console.print(f"[dim]assumed: {escape(line)}[/dim]", soft_wrap=True)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else duration(value)


def print_hardware(reachable: Sequence[Mapping[str, Any]] | None, reference: Sequence[Mapping[str, Any]]) -> None:
    console = _console()
    if reachable is not None:
        table = _table("reachable", "name", "memory", "$/hour")
        for each in reachable:
            memory = gigabytes(each["memory_bytes"])
            table.add_row(escape(each["device"]), escape(each["name"]), memory, f"{each['usd_per_hour']:.2f}")
        _print_table(console, table)
        console.print()
    table = _table("reference", "memory", "$/hour", "bf16 TFLOP/s", "TB/s", "prices seen")
    for each in reference:
        dates = sorted(price["date"] for price in each["prices"])
        seen = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        speeds = f"{each['bf16_tflops']:,.0f}", f"{each['bandwidth_tb_s']:g}"
        table.add_row(escape(each["name"]), f"{each['memory_gb']:g} GB", f"{each['usd_per_hour']:.2f}", *speeds, seen)
    _print_table(console, table)
    console.print("[dim]Reference prices are third parties' captures, for planning only: get a quote.[/dim]")


def print_environments(versions: Sequence[EnvironmentVersion]) -> None:
    console = _console()
    if not versions:
        console.print("No environments yet. Write one: flash env setup   Publish it: flash env push --name NAME")
        return
    table = _table("environment", "version", "size", "files", "pushed")
    now = time.time()
    for each in versions:
        table.add_row(
            each.id,
            each.sha256[:12],
            f"{each.size / 1000:,.1f} kB",
            str(len(each.files)),
            f"{age(now - each.created_at)} ago",
        )
    _print_table(console, table)


def live_display(progress: Progress, run: RunStatus) -> Live:
    """A context manager that redraws `progress` a few times a second."""
    started = run.created_at
    title = f"[bold]{run.run_id}[/bold]  [dim]{escape(str(run.spec.get('model', '')))}[/dim]"

    def draw() -> RenderableType:
        return _frame(progress, title, time.time() - started)

    return Live(get_renderable=draw, console=_console(), refresh_per_second=4, redirect_stderr=True)


def _frame(progress: Progress, title: str, elapsed: float) -> RenderableType:
    parts: list[RenderableType] = [Text.from_markup(f"{title}  {_state(progress.state)}")]
    facts = [progress.phase or "waiting"]
    if progress.download:
        facts.append(f"{progress.download} fetched")
    if progress.step or progress.total_steps:
        facts.append(step_text(progress.step, progress.total_steps))
    facts += [f"{name} {value}" for name, value in headline(progress.values)]
    left = progress.seconds_left(time.time())
    if left is not None and progress.phase == Phase.TRAINING:
        facts.append(f"about {duration(left)} left")
    facts.append(f"{duration(elapsed)} so far")
    line = Text("  ".join(facts), overflow="ellipsis", no_wrap=True)
    if progress.total_steps:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(ProgressBar(total=progress.total_steps, completed=progress.step, width=BAR_WIDTH), line)
        parts.append(row)
    else:
        parts.append(line)
    if progress.checkpoint:
        parts.append(Text(f"checkpoint {progress.checkpoint}", style="dim"))
    if progress.evaluation:
        parts.append(Text(f"evaluation: {evaluation_text(progress.evaluation)}"))
    parts += [Text(f"warning: {text}", style="yellow") for text in progress.warnings[-SHOWN_WARNINGS:]]
    if progress.state != RunState.DONE:  # the last screen stays on the terminal: it is the result's
        parts += [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in progress.recent]
    return Group(*parts)


def _facts(run: RunStatus) -> list[tuple[str, str]]:
    spec = run.spec
    environment = spec.get("environment", {})
    facts = [
        ("model", str(spec.get("model", ""))),
        ("algorithm", str(spec.get("algorithm", ""))),
        ("environment", str(environment.get("id", "") if isinstance(environment, dict) else environment)),
        ("progress", f"{run.phase.value if run.phase else '-'}, {step_text(run.step, run.total_steps)}"),
    ]
    if numbers := headline(run.metrics):
        facts.append(("latest", "  ".join(f"{name} {value}" for name, value in numbers)))
    if report := run.metrics.get("eval"):
        facts.append(("evaluation", evaluation_text(report)))
    if run.checkpoints:
        more = f" ({len(run.checkpoints)} in all)" if len(run.checkpoints) > 1 else ""
        facts.append(("checkpoint", f"{run.checkpoints[-1]}{more}"))
    if run.adapter_ref:
        facts.append(("adapter", run.adapter_ref))
    if run.deployment:
        facts.append(("deployed", run.deployment))
    facts.append(("took" if run.finished_at else "age", duration((run.finished_at or time.time()) - run.created_at)))
    if run.managed.estimated_s is not None and run.finished_at:
        price = "" if not run.cost_usd else f", ${run.cost_usd:.2f} of ${run.estimated_cost_usd or 0:.2f}"
        spent, planned = duration(run.managed.active_s), duration(run.managed.estimated_s)
        facts.append(("estimate", f"{planned} on a device; used {spent}{price}"))
    needed, peak = run.managed.memory_needed_bytes, run.metrics.get("peak_memory_bytes")
    if needed is not None and peak:
        facts.append(("memory", f"{gigabytes(needed)} estimated; {gigabytes(peak)} at its peak"))
    if run.managed.device:
        facts.append(("device", run.managed.device))
    if len(run.attempts) > 1:
        facts.append(("attempts", ", ".join(f"{each.epoch}: {each.failure or each.state}" for each in run.attempts)))
    if run.seed:
        facts.append(("seed", str(run.seed)))
    return facts


def flatten(tables: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and values, depth first."""
    for key, value in tables.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def age(seconds: float) -> str:
    """The largest unit that fits, for tables."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    return str(value)


def _state(state: RunState | str) -> str:
    style = STATE_STYLES.get(str(state))
    return f"[{style}]{state}[/{style}]" if style else str(state)


def _console() -> Console:
    return Console(highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _print_table(console: Console, table: Table) -> None:
    """Prints it with the first column whole, however narrow the terminal: ids are there to be copied."""
    first = table.columns[0]
    first.min_width = max((Text.from_markup(str(cell)).cell_len for cell in first.cells), default=0)
    console.print(table)
