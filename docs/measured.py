"""What was measured, as pages and pictures: `benchmarks/results/*.json`, and two profiled runs in `profiles.json`.

Owns their form on the page. Reads files only; `benchmarks/run.py` and `profiled.py` measure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import charts

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "benchmarks" / "results"
PROFILES = FOLDER / "profiles.json"

TITLES = {
    "sft_cpu": "SFT beside TRL's SFTTrainer",
    "grpo_cpu": "GRPO beside TRL's GRPOTrainer",
    "serve_cpu": "Serving beside `transformers serve`",
    "checkpoint_stall": "Time that training waits for checkpoints",
    "growth": "Growth",
    "curves": "Curves",
    "levers": "What each lever gives",
    "quality": "Quality per compute",
    "waits": "Small waits",
}
UNITS = {"rows_per_s": "rows/s", "tokens_per_s": "tokens/s", "seconds": "s", "seconds_per_step": "s/step", "share": ""}
GOALS = {
    ("sft_cpu", "ratio"): "at least 2",
    ("grpo_cpu", "ratio"): "at most 0.25",
    ("checkpoint_stall", "results", "sft", "share"): "below 0.01",
    ("waits", "ratio", "first step, warm"): "at most 0.5",
}


def results() -> dict[str, dict[str, Any]]:
    """The result files by name, those with a title first and in its order."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: found[name] for name in [*(n for n in TITLES if n in found), *(n for n in found if n not in TITLES)]}


def benchmark_page() -> str:
    lines = [
        "<!-- Generated from benchmarks/results/*.json by `make docs`. -->",
        "# Benchmarks",
        "",
        "`make bench` runs them all, `python benchmarks/run.py NAME` one. Peers have an environment of their own. Both",
        "sides run in turn, each in its own process, with the same model, data, LoRA, precision and threads. A figure",
        "is the median, with the lowest and the highest run behind it; a ratio is that of neighbouring runs.",
        "[Performance](performance.md) says what bounds each and which levers there are.",
    ]
    for name, result in results().items():
        lines += ["", *_section(name, result)]
    return "\n".join(lines) + "\n"


def _section(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {TITLES.get(name, name)}"
    yield ""
    yield f"`python benchmarks/run.py {name}`, {result.get('date', 'undated')}."
    if job := result.get("job"):
        yield ""
        yield f"The work: {_settings(job)}."
    found = list(_spreads(result))
    yield ""
    yield "| | median | lowest to highest | goal |"
    yield "|---|---|---|---|"
    for path, spread, goal in found:
        low, high = charts.number(spread["minimum"]), charts.number(spread["maximum"])
        said = GOALS.get((name, *path), "" if goal is None else f"below {charts.number(goal)}")
        yield f"| {_words(path)} | {charts.number(spread['median'])} | {low} to {high} | {said} |"
    for image, _ in _charts(name, result):
        yield ""
        yield f"![{TITLES.get(name, name).replace('`', '')}](images/{image})"
    yield ""
    for side, value in result.items():
        if isinstance(value, dict) and "settings" in value:
            settings = value["settings"]
            yield f"- Settings of {side}: {_settings(settings) if isinstance(settings, dict) else settings}."
    yield f"- {_machine(result.get('machine') or {})}"
    for line in result.get("notes") or ():
        yield f"- {line}"


def _spreads(value: Any, path: tuple[str, ...] = (), goal: float | None = None) -> Iterator[Any]:
    """(path, spread, goal) of every spread in a result; a goal stands beside it."""
    if not isinstance(value, dict):
        return
    if {"median", "minimum", "maximum"} <= value.keys():
        yield path, value, goal
        return
    own = value.get("goal") if path else None
    for key, inner in value.items():
        yield from _spreads(inner, (*path, key), float(own) if isinstance(own, int | float) else None)


def lever_table() -> str:
    """How many times as long a step takes without each lever: lever by work."""
    result = results().get("levers")
    if result is None:
        return "Not measured yet: `python benchmarks/run.py levers`."
    levers = result["times as long without"]
    works = list(dict.fromkeys(work for by_work in levers.values() for work in by_work))
    lines = ["| a step without | " + " | ".join(works) + " |", "|---" * (1 + len(works)) + "|"]
    for lever, by_work in levers.items():
        cells = [f"{by_work[work]['median']:.2f} times" if work in by_work else "" for work in works]
        lines.append(f"| {lever} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _charts(name: str, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, SVG): one chart for each kind of figure that has several, and one of all curves."""
    kinds: dict[str, list[charts.Bar]] = {}
    for path, spread, _ in _spreads(result):
        if "ratio" in path or len(path) < 2 or path[0] == "curves":
            continue
        label = _words(path[:-1] if path[0] != "results" else path[1:-1])
        bar = charts.Bar(label, spread["median"], spread["minimum"], spread["maximum"])
        kinds.setdefault(path[-1], []).append(bar)
    for kind, rows in kinds.items():
        if len(rows) > 1:
            unit = UNITS.get(kind, "")
            title = f"{TITLES.get(name, name).replace('`', '')}: {kind.replace('_', ' ')}"
            yield re.sub(r"[_ ]", "-", f"bench-{name}-{kind}.svg"), charts.bars(title, unit, rows)
    curves = [
        (f"by {curve.replace('_', ' ')}", [
            charts.Bar(at, *(1000 * spread[key] for key in ("median", "minimum", "maximum")))
            for at, point in points.items() for spread in point.values()
        ])
        for curve, points in result.get("curves", {}).items()
    ]  # fmt: skip
    if curves:
        yield f"bench-{name}.svg", charts.panels("A step of flash/nano on a CPU", "ms", curves)


def _words(path: tuple[str, ...]) -> str:
    return ", ".join(part.replace("_", " ") for part in path if part != "results")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    peers = ", ".join(f"{name} {version}" for name, version in (machine.get("peer_versions") or {}).items())
    parts = [f"{machine.get(key)}{unit}" for key, unit in (("cpu", ""), ("cores", " cores"), ("memory_gib", " GiB"))]
    load = [f"load {machine['load']} at the end"] if "load" in machine else []
    where = ", ".join([*parts, str(machine.get("system")), *load])
    return f"Machine: {where}, Python {machine.get('python')}. Flash's side: {versions}. Peers': {peers}."


# --- profiled runs ------------------------------------------------------------------------------------------


def profile_table(algorithm: str) -> str:
    """The picture, and how long each part took."""
    measured = json.loads(PROFILES.read_text(encoding="utf-8"))
    run = measured[algorithm]
    whole, training = _parts(run["seconds"])
    lines = [
        f"![Where the time of this {algorithm.upper()} run went](images/profile-{algorithm}.svg)",
        "",
        f"`{run['command']}`, {run['steps']} steps, {measured['date']}; {_machine(measured['machine'])}",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
    ]
    for prefix, parts in (("", whole), ("training: ", training)):
        total = sum(seconds for _, seconds in parts) or 1.0
        lines += [f"| {prefix}{name} | {seconds:.2f} | {seconds / total:.0%} |" for name, seconds in parts]
    return "\n".join(lines)


def _parts(seconds: Mapping[str, float]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The run's phases; and the parts of its training, with what is between them."""
    whole = [(name, value) for name, value in seconds.items() if ":" not in name and name != "uploads"]
    inner = [(name.split(": ")[1], value) for name, value in seconds.items() if name.startswith("training: ")]
    rest = seconds.get("training", 0.0) - sum(value for _, value in inner)
    return whole, [*inner, ("between", max(0.0, rest))]


def images() -> dict[str, str]:
    """Every picture by its file's name below `images/`."""
    found = {file: svg for name, result in results().items() for file, svg in _charts(name, result)}
    measured = json.loads(PROFILES.read_text(encoding="utf-8"))
    for algorithm in ("sft", "grpo"):
        run = measured[algorithm]
        whole, training = _parts(run["seconds"])
        rows = [("the run", whole), (f"its {run['steps']} training steps", training)]
        found[f"profile-{algorithm}.svg"] = charts.stacks(f"{algorithm.upper()}: {run['command']}", rows)
    return found
