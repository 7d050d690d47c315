"""Measures what a `flash/nano` base can do on held-out tasks: the figures of its model card.

    python -m nano.evaluate [MODEL_FOLDER] [--write-card]

Owns the yardsticks (greedy exact match by kind, with and without thinking; pass@8 at temperature 1)
and the bounds that the shipped weights must keep. Prints one JSON object, which `--write-card` also
puts into the folder's README.md; exits 1 outside the bounds.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nano.sampling import sample
from nano.tasks import Task, arithmetic_tasks, task_of_kind

SHIPPED = Path(__file__).resolve().parents[1] / "src" / "flash" / "catalog" / "nano"
MAX_TOKENS = {False: 32, True: 80}
ARITHMETIC_KINDS = ("addition", "subtraction", "word")
TEXT_KINDS = ("string", "json")

# Low enough to leave something to learn, and spread enough that sampling finds what greedy misses.
BOUNDS = {
    "addition": (0.20, 0.45),
    "addition_pass_at_8": (0.85, 1.0),
    "string": (0.60, 1.0),
    "json": (0.60, 1.0),
}


def held_out_tasks(kind: str, count: int, *, seed: int = 0) -> list[Task]:
    """`count` tasks of a kind on operands or texts that neither base nor training rows hold."""
    rng = random.Random(f"{kind}-{seed}")
    if kind in ARITHMETIC_KINDS:
        return arithmetic_tasks("eval", kind, count, rng)
    return [task_of_kind(kind, "eval", rng) for _ in range(count)]


def prompt_ids(tokenizer: Any, task: Task, *, thinking: bool) -> list[int]:
    """Token ids of the task's question, ready for the answer."""
    text = tokenizer.apply_chat_template(
        task.prompt(),
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def answers(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    thinking: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> list[str]:
    """What the model answers, after the last `</think>`, stripped; empty if thinking never ended."""
    texts: list[str] = []
    for start in range(0, len(tasks), batch_size):
        sampled = sample(
            model,
            [prompt_ids(tokenizer, task, thinking=thinking) for task in tasks[start : start + batch_size]],
            stop_ids=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id,
            max_tokens=MAX_TOKENS[thinking],
            temperature=temperature,
            generator=generator,
        )
        for text in tokenizer.batch_decode(sampled, skip_special_tokens=True):
            _, closed, answer = text.rpartition("</think>")
            texts.append(answer.strip() if closed or not thinking else "")
    return texts


def accuracy(model: Any, tokenizer: Any, tasks: Sequence[Task], *, thinking: bool = False) -> float:
    """Share of tasks answered exactly, greedily."""
    given = answers(model, tokenizer, tasks, thinking=thinking)
    return sum(answer == task.answer for answer, task in zip(given, tasks, strict=True)) / len(tasks)


def pass_at_8(model: Any, tokenizer: Any, tasks: Sequence[Task], *, seed: int = 0) -> float:
    """Share of tasks that at least one of eight samples at temperature 1 answers exactly."""
    repeated = [task for task in tasks for _ in range(8)]
    generator = torch.Generator().manual_seed(seed)
    given = answers(model, tokenizer, repeated, temperature=1.0, generator=generator)
    right = [answer == task.answer for answer, task in zip(given, repeated, strict=True)]
    return sum(any(right[start : start + 8]) for start in range(0, len(right), 8)) / len(tasks)


def measure(model: Any, tokenizer: Any, *, count: int = 500) -> dict[str, float]:
    """Every figure of the model card, as shares of `count` held-out tasks each."""
    figures: dict[str, float] = {}
    for kind in (*ARITHMETIC_KINDS, *TEXT_KINDS, "tool", "guess"):
        tasks = held_out_tasks(kind, count)
        figures[kind] = accuracy(model, tokenizer, tasks)
        figures[f"{kind}_thinking"] = accuracy(model, tokenizer, tasks, thinking=True)
        if kind in ARITHMETIC_KINDS:
            figures[f"{kind}_pass_at_8"] = pass_at_8(model, tokenizer, tasks)
    return {name: round(value, 3) for name, value in figures.items()}


def faults(figures: dict[str, float]) -> list[str]:
    """What lies outside the bounds, in words; empty for a base that may ship."""
    found = [
        f"{name} is {figures[name]:.3f}, outside {low:.2f} to {high:.2f}"
        for name, (low, high) in BOUNDS.items()
        if not low <= figures[name] <= high
    ]
    found += [
        f"{kind} is no better with thinking ({figures[f'{kind}_thinking']:.3f}) than without ({figures[kind]:.3f})"
        for kind in ARITHMETIC_KINDS
        if figures[f"{kind}_thinking"] <= figures[kind]
    ]
    return found


def write_card(folder: Path, figures: dict[str, float]) -> None:
    """Replace the JSON block of the folder's model card."""
    card = folder / "README.md"
    block = f"```json\n{json.dumps(figures, indent=1)}\n```"
    text = card.read_text(encoding="utf-8")
    card.write_text(re.sub(r"```json\n.*?\n```", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--write-card", action="store_true")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    figures = measure(model, tokenizer)
    print(json.dumps(figures, indent=1))
    if options.write_card:
        write_card(options.folder, figures)
    for fault in faults(figures):
        print(fault, file=sys.stderr)
    return 1 if faults(figures) else 0


if __name__ == "__main__":
    sys.exit(main())
