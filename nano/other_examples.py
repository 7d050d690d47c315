"""Writes the rows of the examples beside `arithmetic`: letters-thinking, guess and calculator-agent.

    python -m nano.other_examples [FOLDER]

Where a question has something to remember, training and evaluation rows come from splits that the base
model was not raised on. The guessing game has nothing of that kind: the secret is not in the prompt.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from nano.tasks import LETTERS, Split, split_of_key, split_of_pair

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COUNTS: dict[Split, int] = {"train": 1500, "eval": 300}
PHRASES = tuple(f"Use the calculator. {question}?" for question in ("What is {call}", "{call}", "How much is {call}"))
Row = dict[str, object]


def letters_rows(split: Split) -> list[Row]:
    """Five different letters to reverse."""
    rng = random.Random(f"letters-{split}")
    spelled: dict[str, None] = {}
    while len(spelled) < COUNTS[split]:
        letters = " ".join(rng.sample(LETTERS, 5))
        if split_of_key(letters) == split:
            spelled[letters] = None
    return [{"input": f"Reverse the letters {letters}", "output": letters[::-1]} for letters in spelled]


def guess_rows(split: Split) -> list[Row]:
    """Every secret once, in both splits."""
    return [{"input": "Guess my number from 1 to 20.", "output": str(secret)} for secret in range(1, 21)]


def calculator_rows(split: Split) -> list[Row]:
    """Sums and differences of three-digit numbers, asked for in turn in each of the phrases."""
    rng = random.Random(f"calculator-{split}")
    calls: dict[str, int] = {}
    while len(calls) < COUNTS[split]:
        a, b = sorted((rng.randint(100, 999), rng.randint(100, 999)), reverse=True)
        if split_of_pair(a, b) == split:
            sign = rng.choice("+-")
            calls[f"{a} {sign} {b}"] = a + b if sign == "+" else a - b
    return [
        {
            "input": PHRASES[number % len(PHRASES)].format(call=call),
            "output": str(result),
            "metadata": {"call": call, "phrase": number % len(PHRASES)},
        }
        for number, (call, result) in enumerate(calls.items())
    ]


ROWS: dict[str, Callable[[Split], list[Row]]] = {
    "letters-thinking": letters_rows,
    "guess": guess_rows,
    "calculator-agent": calculator_rows,
}


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES
    for name, rows in ROWS.items():
        folder = root / name / "dataset"
        folder.mkdir(parents=True, exist_ok=True)
        for split in COUNTS:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split)]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
