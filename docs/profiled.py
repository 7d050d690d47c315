"""Measures `profiles.json`: one SFT and one GRPO run of the arithmetic example, each through `flash profile`.

    .venv/bin/python docs/profiled.py       two small runs of flash/nano, a minute or two

The commands run under an empty FLASH_HOME, SFT after a first short run that warms the machine's file cache.
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

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "profiles.json"
STEPS = {"sft": 100, "grpo": 40}
KEY = {"sft": "train.max_steps", "grpo": "train.steps"}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import machine

    measured: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    with tempfile.TemporaryDirectory() as home:
        flash(home, "env", "push", "--name", "arithmetic", "examples/arithmetic")
        train(home, "sft", 2)
        for algorithm, steps in STEPS.items():
            run_id = train(home, algorithm, steps)
            said = json.loads(flash(home, "profile", run_id, "--output", f"{home}/trace.json", "--json"))
            command = f"flash train examples/arithmetic/{algorithm}.toml --set {KEY[algorithm]}={steps}"
            seconds = {name: round(value, 4) for name, value in said["seconds"].items()}
            measured[algorithm] = {"command": command, "steps": steps, "seconds": seconds}
        flash(home, "server", "stop")
    TARGET.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}; now: make docs")


def train(home: str, algorithm: str, steps: int) -> str:
    """The run's id, once it has ended."""
    chosen = ("--set", f"{KEY[algorithm]}={steps}")
    said = flash(home, "train", f"examples/arithmetic/{algorithm}.toml", *chosen, "--background", "--json")
    run_id = str(json.loads(said)["run_id"])
    flash(home, "status", run_id, "-f")
    while json.loads(flash(home, "status", run_id, "--json"))["attempts"][-1]["ended_at"] is None:
        time.sleep(0.2)
    return run_id


def flash(home: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FLASH_", "FREESOLO_"))}
    done = subprocess.run(
        [sys.executable, "-m", "flash.cli.main", *arguments], cwd=ROOT, env={**environment, "FLASH_HOME": home},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"error: flash {' '.join(arguments)} failed\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
