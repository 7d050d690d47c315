"""The small waits between a person and their run: each the wall-clock time of the real command, `flash/nano` on a CPU.

First steps stand beside that of a TRL script with the same rows, LoRA, batch and lengths, in turn. One command, about
three minutes on two idle cores: `python benchmarks/run.py waits`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Spread, ensure_peers, run_side, write_result
from benchmarks.sft_cpu import JOB, rendered_rows

from flash.catalog.catalog import load_catalog
from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.records import RunState
from flash.storage import identity, runs, schema
from flash.storage.database import Database

TIMES, STARTS, MANY = 7, 5, 10_000
GOALS: dict[str, float | None] = {
    "--help": 0.15,
    "train --dry-run": 0.4,
    "submit, server up": 0.5,
    "submit, server down": 2.0,
    "first step, cold": 6.0,
    "first step, warm": 2.0,
    "first step, a TRL script": None,  # its goal is a ratio
    f"runs, of {MANY:,}": 0.5,
}
NOTES = [
    "A first step counts from the start of the command, or of the script's process, to the end of the first optimizer "
    "step. Cold: no server runs, and the command starts one; warm: one runs.",
    "Ratios are to the script, whose rows are tokenised beforehand, as Flash keeps them from one run to the next.",
]
CONFIG = ["train", "examples/arithmetic/sft.toml", "--set", "train.max_steps=1"]


def main() -> None:
    peers, peers_job = ensure_peers(), {**JOB, "rows": rendered_rows(), "warmup_steps": 1, "steps": 1}
    peers_first_step(peers, peers_job)  # not counted: it reads its packages from the disk
    waits: dict[str, list[float]] = {name: [] for name in GOALS}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(TIMES):
            waits["--help"].append(timed(home, "--help"))
            waits["train --dry-run"].append(timed(home, *CONFIG, "--dry-run"))
        flash(home, "env", "push", "--name", "arithmetic", "examples/arithmetic")
        for _ in range(STARTS):
            flash(home, "server", "stop")
            waits["first step, a TRL script"].append(peers_first_step(peers, peers_job))
            submitted, stepped = first_step(home)
            waits["submit, server down"].append(submitted)
            waits["first step, cold"].append(stepped)
            submitted, stepped = first_step(home)
            waits["submit, server up"].append(submitted)
            waits["first step, warm"].append(stepped)
        flash(home, "server", "stop")
    with tempfile.TemporaryDirectory() as home:
        fill(Path(home), MANY)
        flash(home, "runs")
        waits[f"runs, of {MANY:,}"] = [timed(home, "runs") for _ in range(TIMES)]
        flash(home, "server", "stop")

    print("Waits of the real command, flash/nano, CPU fp32")
    result: dict[str, Any] = {}
    for name, seconds in waits.items():
        spread = Spread.of(seconds)
        goal = GOALS[name]
        result[name] = {"seconds": vars(spread), "goal": goal}
        print(f"  {name}: {spread} s" + (f" (goal {goal:g})" if goal else ""))
    ratios = {}
    for name in ("first step, cold", "first step, warm"):
        pairs = zip(waits[name], waits["first step, a TRL script"], strict=True)
        ratios[name] = Spread.of([ours / theirs for ours, theirs in pairs])
        print(f"  {name}: {ratios[name]} of a TRL script's" + (" (goal at most 0.5)" if name.endswith("warm") else ""))
    job = {"model": "flash/nano", "environment": "examples/arithmetic"}
    path = write_result("waits", {"job": job, "results": result, "ratio": ratios, "notes": NOTES})
    print(f"  written to {path.relative_to(ROOT.parent)}")


def first_step(home: str) -> tuple[float, float]:
    """Seconds from the command's start to its return, and to the end of the run's first step."""
    began = time.time()
    run = json.loads(flash(home, *CONFIG, "--background", "--json"))
    submitted = time.time() - began
    flash(home, "status", run["run_id"], "-f")
    trace = Path(home) / "trace.json"
    flash(home, "profile", run["run_id"], "--output", str(trace))
    told = json.loads(trace.read_text())
    [step] = [entry for entry in told["traceEvents"] if entry["ph"] == "X" and entry["name"] == "step 1"]
    return submitted, told["otherData"]["submitted_at"] + (step["ts"] + step["dur"]) / 1e6 - began


def peers_first_step(python: Path, job: dict[str, Any]) -> float:
    """Seconds from the start of the script to the end of its first step."""
    began = time.time()
    return float(run_side(python, "trl_sft.py", job)["first_step_ended_at"]) - began


def fill(home: Path, count: int) -> None:
    """A database of so many finished runs."""
    parsed, _ = parse_config({"model": "flash/nano", "environment": {"id": "local/arithmetic"}}, catalog=load_catalog())
    spec = resolve(parsed, seed=0).model_dump(mode="json")
    new = runs.NewRun("local", parsed.document(), spec, 0, "local", "arithmetic", "ab" * 32)
    database = Database(f"sqlite:///{home / 'flash.db'}")
    with database.write() as connection:
        identity.ensure_org(connection, "local")
        for number in range(count):
            runs.insert_run(connection, new, now=1_700_000_000.0 + number)
        connection.execute(schema.runs.update().values(state=RunState.DONE.value, finished_at=1_700_100_000.0))
    database.close()


def timed(home: str, *arguments: str) -> float:
    began = time.perf_counter()
    flash(home, *arguments)
    return time.perf_counter() - began


def flash(home: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "FREESOLO_"))}
    command = [str(Path(sys.executable).with_name("flash")), *arguments]
    done = subprocess.run(
        command, cwd=ROOT.parent, env={**environment, "FLASH_HOME": home}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"error: flash {' '.join(arguments)} failed\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
