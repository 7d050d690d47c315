"""Writes the rows of `examples/arithmetic/dataset/`.

    python -m nano.arithmetic_example [FOLDER]

The training rows use operand pairs that the base model never saw, the evaluation rows pairs that
neither saw.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from nano.tasks import Split, arithmetic_tasks

DATASET = Path(__file__).resolve().parents[1] / "examples" / "arithmetic" / "dataset"
# Questions of each kind, plain sums foremost.
COUNTS: dict[Split, dict[str, int]] = {
    "train": {"addition": 1800, "subtraction": 1100, "word": 1100},
    "eval": {"addition": 300, "subtraction": 150, "word": 150},
}


def rows(split: Split) -> list[dict[str, object]]:
    """The rows of a split, kinds mixed, in an order fixed by a seed."""
    rng = random.Random(f"arithmetic-{split}")
    tasks = [task for kind, count in COUNTS[split].items() for task in arithmetic_tasks(split, kind, count, rng)]
    rng.shuffle(tasks)
    return [{"input": task.question, "output": task.answer, "metadata": {"kind": task.kind}} for task in tasks]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATASET
    folder.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
