"""What was proved of every layout: recorded by running `tests/layouts`, shown as a table in models.md.

`make layouts` runs those tests, the slow ones too, and writes `layouts.json`: for each layout and feature the tests
that stand behind it. It writes nothing unless all of them pass. A test holds the file to the tests that there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER / "layouts.json"


def table() -> str:
    """A row a layout, a column a feature; a tick where the record names a test."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    features = record["features"]
    lines = [f"| layout | models | {' | '.join(features)} |", f"|---|---|{':-:|' * len(features)}"]
    for name, row in record["layouts"].items():
        models = ", ".join(f"`{model}`" for model in row["models"])
        ticks = " | ".join("✓" if row["tests"].get(feature) else "–" for feature in features)
        lines.append(f"| {name} | {models} | {ticks} |")
    return "\n".join(lines)


def record() -> int:
    """Runs the tests and writes what passed; pytest's exit status."""
    root = FOLDER.parent
    sys.path.insert(0, str(root))
    from tests.layouts.checkpoints import LAYOUTS
    from tests.layouts.proofs import FEATURES, RESULTS_VARIABLE

    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "passed.jsonl"
        results.touch()
        command = [sys.executable, "-m", "pytest", "tests/layouts", "--timeout", "900"]
        command += ["--ignore", "tests/layouts/test_table.py"]  # it reads what is about to be written
        ran = subprocess.run(command, cwd=root, env={**os.environ, RESULTS_VARIABLE: str(results)}, check=False)
        passed = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    if ran.returncode != 0:
        print("docs/layouts.json is left as it is: a test failed", file=sys.stderr)
        return ran.returncode
    rows = {
        name: {
            "models": list(layout.models),
            "tests": {
                feature: sorted(p["test"] for p in passed if (p["layout"], p["feature"]) == (name, feature))
                for feature in FEATURES
            },
        }
        for name, layout in LAYOUTS.items()
    }
    RECORD.write_text(json.dumps({"features": FEATURES, "layouts": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(record())
