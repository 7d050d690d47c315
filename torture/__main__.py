"""`python -m torture [--short] [--seed N] [--row NAME ...] [--count N] [--write | --add]`: what Flash survives.

`--write` keeps the results in torture/results.json and puts the table that follows from them into
docs/reliability.md; `--add` does, and adds to a row's earlier trials instead of replacing them. Ends with 1 if
anything was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torture.rows import ROWS
from torture.tally import Row, Tally, Trial, Unsupported, table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- table -->", "<!-- /table -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the counts that the tests use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", action="append", choices=[row.key for row in ROWS], help="this row only; repeatable")
    parser.add_argument("--count", type=int, help="this many faults instead of the row's own number")
    parser.add_argument("--write", action="store_true", help="keep the results and put the table into the page")
    parser.add_argument("--add", action="store_true", help="the same, beside the row's earlier trials")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a row's own process: its tally as JSON
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the faults are told of in plenty
    if chosen.one:
        return _one(chosen.one, chosen.count, chosen.seed)
    results = []
    for row in ROWS:
        if chosen.row and row.key not in chosen.row:
            continue
        trial = _in_own_process(row, chosen.count or (row.short if chosen.short else row.long), chosen.seed)
        tally = trial.tally
        if not tally.injected:
            print(f"{row.name}: not run: {tally.note}", file=sys.stderr)
            continue
        results.append((row, [trial]))
        print(f"{row.name}: {tally.injected:,} injected, {tally.lost:,} lost, {trial.seconds:.0f} s", file=sys.stderr)
        for loss in tally.losses[:5]:
            print(f"  lost: {loss}", file=sys.stderr)
        if chosen.write or chosen.add:
            keep(row, trial, beside=chosen.add)
            publish()
    print(table(results))
    return int(any(trials[0].tally.losses for _, trials in results))


def _one(key: str, count: int, seed: int) -> int:
    row = next(row for row in ROWS if row.key == key)
    try:
        print(json.dumps(vars(row.run(count, seed))))
    except Unsupported as reason:
        print(json.dumps({"note": str(reason)}))
    return 0


def _in_own_process(row: Row, count: int, seed: int) -> Trial:
    """A row of its own process, so that none starts from another's memory and handles."""
    began = time.monotonic()
    command = [sys.executable, "-m", "torture", "--one", row.key, "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        tally = Tally(**json.loads(done.stdout.strip().splitlines()[-1]))
    else:
        tally = Tally(injected=1, losses=[f"the row itself ended with status {done.returncode}"])
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    return Trial(seed, tally, time.monotonic() - began, time.strftime("%Y-%m-%d"), machine)


# --- what is kept -------------------------------------------------------------------------------------


def kept() -> dict[str, list[dict[str, Any]]]:
    """Trials by row, as they were written."""
    found: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(row: Row, trial: Trial, *, beside: bool) -> None:
    results = kept()
    results[row.key] = [*(results.get(row.key, []) if beside else []), dataclasses.asdict(trial)]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def publish() -> None:
    """The page's table, made anew from what is kept."""
    results = kept()
    rows = [(row, [_trial(each) for each in results[row.key]]) for row in ROWS if row.key in results]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _trial(each: dict[str, Any]) -> Trial:
    return Trial(**{**each, "tally": Tally(**each["tally"])})


if __name__ == "__main__":
    sys.exit(main())
