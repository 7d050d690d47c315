"""What may grow with a run and what must not: rows and steps. `flash/nano` on a CPU, fp32.

A million generated rows must start training within 3 s of a thousand once they have been prepared, with flat memory;
a long run must keep its speed and memory. Rows go through the real command, and `flash profile` says when the first
step was done. One command: `python benchmarks/run.py growth`; `FLASH_GROWTH_ROWS=100000 FLASH_GROWTH_STEPS=3000`
is a shorter form: a million rows take some three minutes, a hundred thousand steps fifteen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, Spread, run_side, write_result

import flash.catalog

NANO = Path(flash.catalog.__file__).parent / "nano"
ARITHMETIC = ROOT.parent / "examples" / "arithmetic"
ROWS = int(os.environ.get("FLASH_GROWTH_ROWS", "1000000"))
FEW, AGAIN = 1_000, 3  # starts after the first
GOAL_S, GOAL_MEMORY = 3.0, 1.1
LONG_STEPS = int(os.environ.get("FLASH_GROWTH_STEPS", "100000"))  # of one row each
SFT = {"model": str(NANO), "environment": str(ARITHMETIC), "threads": 2, "lora_alpha": 64, "batch_size": 32,
       "max_length": 256, "learning_rate": 1e-3, "warmup_steps": 2, "steps": 8}  # fmt: skip
ENVIRONMENT = '''
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class Sums(EnvironmentSingleTurn):
    """Adds two numbers."""

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response):
        return RewardResult(score=float(response.strip() == example.output))


def load_environment():
    return Sums()
'''


def main() -> None:
    starts = {"few": _starts(FEW), "many": _starts(ROWS)}
    later = {name: Spread.of([run["first_step_s"] for run in runs[1:]]) for name, runs in starts.items()}
    data = {name: Spread.of([run["preparing_s"] for run in runs[1:]]) for name, runs in starts.items()}
    memory = starts["many"][-1]["peak_memory_bytes"] / starts["few"][-1]["peak_memory_bytes"]
    extra = later["many"].median - later["few"].median
    print(f"Growth on flash/nano, CPU fp32: {FEW:,} and {ROWS:,} rows, from submit to the first step")
    for name, runs in starts.items():
        first, peak = runs[0], runs[-1]["peak_memory_bytes"] / 1e6
        print(f"  {name}: {first['first_step_s']:.3g} s the first time ({first['preparing_s']:.3g} s of it for data),"
              f" then {later[name]} s; peak memory {peak:.0f} MB")  # fmt: skip
    print(f"  more rows cost {extra:.3g} s (goal {GOAL_S:g}) and {memory:.3g} times the memory (goal {GOAL_MEMORY:g})")

    job = {**SFT, "lora_rank": 8, "batch_size": 1, "warmup_steps": 0, "steps": LONG_STEPS}
    long = run_side(sys.executable, "flash_long.py", job, timeout_s=3600)
    print(f"  {LONG_STEPS:,} steps: the last tenth takes {long['slower']:.3g} times the first's,"
          f" memory grows by {long['grown_bytes'] / 1e6:.1f} MB")  # fmt: skip
    path = write_result("growth", {
        "job": {"model": "flash/nano", "precision": "fp32", "threads": 2, "few": FEW, "many": ROWS},
        "start": {
            f"{count:,} rows, again": {"seconds": vars(later[name])}
            for name, count in (("few", FEW), ("many", ROWS))
        },
        "notes": [
            f"{ROWS:,} rows start {extra:+.2f} s after {FEW:,} (goal: within {GOAL_S:g} s), with {memory:.2f} times the"
            f" memory; the first time they took {starts['many'][0]['first_step_s']:.0f} s.",
            f"Of those starts, preparing data took {data['few'].median:.2f} s with {FEW:,} rows and"
            f" {data['many'].median:.2f} s with {ROWS:,}; the rest is the start of processes and imports.",
            f"{LONG_STEPS:,} steps of one row: the last tenth took {long['slower']:.2f} times as long as the first, and"
            f" memory grew by {long['grown_bytes'] / 1e6:.1f} MB.",
        ],
        "long": long, "starts": starts,
    })  # fmt: skip
    print(f"  written to {path.relative_to(ROOT.parent)}")


def _starts(rows: int) -> list[dict[str, float]]:
    """Runs of three steps over so many rows, under a home of their own: the first one, and those after it."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        (project / "sums" / "dataset").mkdir(parents=True)
        (project / "sums" / "environment.py").write_text(ENVIRONMENT)
        with (project / "sums" / "dataset" / "train.jsonl").open("w") as file:
            for number in range(rows):
                one, other = number % 1000, number // 1000
                file.write(f'{{"input": "What is {one} + {other}?", "output": "{one + other}"}}\n')
        (project / "sums.toml").write_text(
            'model = "flash/nano"\n[environment]\nid = "local/sums"\n[train]\nmax_steps = 3\nsave_every = 1000\n'
        )
        home = str(Path(folder) / "home")
        _flash(home, project, "env", "push", "--name", "sums", "sums")
        try:
            return [_start(home, project) for _ in range(1 + AGAIN)]
        finally:
            _flash(home, project, "server", "stop")


def _start(home: str, project: Path) -> dict[str, float]:
    run = json.loads(_flash(home, project, "train", "sums.toml", "--background", "--json"))["run_id"]
    _flash(home, project, "status", run, "-f")
    profile = json.loads(_flash(home, project, "profile", run, "--output", "trace.json", "--json"))
    trace = json.loads((project / "trace.json").read_text())
    [first] = [entry for entry in trace["traceEvents"] if entry["ph"] == "X" and entry["name"] == "step 1"]
    metrics = json.loads(_flash(home, project, "status", run, "--json"))["metrics"]
    return {
        "first_step_s": (first["ts"] + first["dur"]) / 1e6,
        "preparing_s": profile["seconds"]["preparing data"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
    }


def _flash(home: str, project: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "FREESOLO_"))}
    done = subprocess.run(
        [sys.executable, "-m", "flash.cli.main", *arguments], cwd=project, env={**environment, "FLASH_HOME": home},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"error: flash {' '.join(arguments)} failed\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
