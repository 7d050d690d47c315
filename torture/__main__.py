"""`python -m torture [--short] [--seed N] [--row NAME ...] [--write]`: the table of what Flash survives.

`--write` puts the table into docs/reliability.md. Ends with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from torture.rows import ROWS
from torture.tally import Row, Tally, Unsupported, table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the counts that the tests use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", action="append", choices=[row.key for row in ROWS], help="this row only; repeatable")
    parser.add_argument("--count", type=int, help="this many faults instead of the row's own number")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a row's own process: its tally as JSON
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the faults are told of in plenty
    rows = [row for row in ROWS if not chosen.row or row.key in chosen.row]
    if chosen.one:
        row = next(row for row in ROWS if row.key == chosen.one)
        try:
            print(json.dumps(vars(row.run(chosen.count, chosen.seed))))
        except Unsupported as reason:
            print(json.dumps({"note": str(reason)}))
        return 0
    results = []
    for row in rows:
        count = chosen.count or (row.short if chosen.short else row.long)
        tally, seconds = _in_own_process(row, count, chosen.seed)
        if not tally.injected:
            print(f"{row.name}: not run: {tally.note}", file=sys.stderr)
            continue
        results.append((row, tally, seconds))
        print(f"{row.name}: {tally.injected:,} injected, {tally.lost:,} lost, {seconds:.0f} s", file=sys.stderr)
        for loss in tally.losses[:5]:
            print(f"  lost: {loss}", file=sys.stderr)
    text = f"{table(results)}\n\nSeed {chosen.seed}, {time.strftime('%Y-%m-%d')}, {_machine()}."
    print(text)
    if chosen.write:
        _write(text)
    return int(any(tally.losses for _, tally, _ in results))


def _in_own_process(row: Row, count: int, seed: int) -> tuple[Tally, float]:
    """A row of its own process, so that none starts from another's memory and handles."""
    began = time.monotonic()
    command = [sys.executable, "-m", "torture", "--one", row.key, "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        return Tally(injected=1, losses=[f"the row itself ended with status {done.returncode}"]), seconds
    return Tally(**json.loads(done.stdout.strip().splitlines()[-1])), seconds


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def _write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    earlier, _, after = rest.partition(END)
    text = _with_rows_of(earlier, text)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _with_rows_of(earlier: str, text: str) -> str:
    """The new table, with the rows of the earlier one that were not run now, in the table's own order."""
    lines = {line.split("|")[1].strip(): line for line in earlier.splitlines() if line.startswith("| ")}
    lines |= {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    head = next(at for at, line in enumerate(text.splitlines()) if line.startswith("|---"))
    rows = [lines[row.name] for row in ROWS if row.name in lines]
    return "\n".join([*text.splitlines()[: head + 1], *rows, "", text.splitlines()[-1]])


if __name__ == "__main__":
    sys.exit(main())
