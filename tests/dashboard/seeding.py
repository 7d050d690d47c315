"""Runs as a database would hold them, written in one go: a long one, one that failed and went on, one full of
hostile text. What they hold is made up; how it is stored is the product's own way of storing it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash.catalog.catalog import load_catalog
from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.records import AttemptState, EventKind, RunState
from flash.storage import events, identity, runs, schema
from flash.storage.database import Database
from flash.storage.events import NewEvent

LONG, FAILED, HOSTILE = "flash-1700000000-0000a001", "flash-1700000100-0000a002", "flash-1700000200-0000a003"
STEPS, SAMPLES = 100_000, 10_000
SHA = "ab" * 32

# What a model, an environment or a person could have written.
MARKUP = '<img src=x onerror="window.harmed=true"><script>window.harmed=true</script><b>bold</b>'
HOSTILE_TEXTS = {
    "markup": MARKUP,
    "ansi": "\x1b[31mred\x1b[0m plain \x1b[2J\x1b]0;title\x07 \x1b]8;;http://bad.example\x1b\\link\x1b]8;;\x1b\\ end",
    "controls": "null \x00 bell \x07 backspace \x08 delete \x7f",
    "direction": "user \u202egnp.exe\u202c \u2066isolated\u2069 zero\u200bwidth",
    "broken": b"broken \xff\xfe utf-8 \xc3( \xed\xa0\x80".decode("utf-8", "replace"),
    "long": "no-break" * 5000,
}


def new_run(
    database: Database, run_id: str, config: dict[str, Any], *, created_at: float, step: int = 0,
    steps: int | None = None,
) -> None:  # fmt: skip
    catalog = load_catalog()
    parsed, warnings = parse_config(config, catalog=catalog)
    spec = resolve(parsed, catalog=catalog)
    namespace, name = config["environment"]["id"].split("/")
    new = runs.NewRun(
        "local", parsed.document(), spec.model_dump(mode="json"), 0, namespace, name, SHA, warnings=warnings
    )
    with database.write() as connection:
        identity.ensure_org(connection, "local")
        runs.insert_run(connection, new, now=created_at, run_id=run_id)
        values = {"state": RunState.RUNNING.value, "step": step, "total_steps": steps}
        connection.execute(schema.runs.update().where(schema.runs.c.id == run_id).values(**values))


def tell(database: Database, run_id: str, told: Sequence[NewEvent], *, now: float, batch: int = 5000) -> None:
    for begin in range(0, len(told), batch):
        with database.write() as connection:
            events.append(connection, run_id, told[begin : begin + batch], now=now)


def attempt(database: Database, run_id: str, epoch: int, began: float, ended: float, **columns: Any) -> None:
    with database.write() as connection:
        connection.execute(
            schema.attempts.insert().values(
                run_id=run_id, epoch=epoch, token_sha256="", device="cpu", work_dir="/nowhere", created_at=began,
                claimed_at=began, ended_at=ended, step=0, progress=0, acknowledged=0,
                state=AttemptState.ENDED.value, **columns,
            )
        )  # fmt: skip


def end(database: Database, run_id: str, state: RunState, *, at: float) -> None:
    with database.write() as connection:
        connection.execute(
            schema.runs.update()
            .where(schema.runs.c.id == run_id)
            .values(state=state.value, finished_at=at, updated_at=at, phase=None, cleaned_at=at)
        )


def sample(step: int, row: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    rewards = [float(draw.random() < 0.3 + 0.6 * step / STEPS) for _ in range(8)]
    answer = f"<think>{row} plus {step % 10} is {row + step % 10}</think>{row + step % 10}<|im_end|>"
    return {
        "step": step,
        "kind": "rollout",
        "row": row,
        "messages": [
            {"role": "user", "content": f"What is {row} + {step % 10}?"},
            {"role": "assistant", "content": str(row + step % 10)},
        ],
        "text": answer,
        "reward": rewards[0],
        "rewards": rewards,
        "success": bool(rewards[0]),
        "truncated": draw.random() < 0.05,
        "tokens": len(answer),
        "turns": 1,
    }


def long_run(database: Database, *, steps: int = STEPS, samples: int = SAMPLES, began: float = 1.7e9) -> str:
    """A GRPO run of a hundred thousand steps with ten thousand samples."""
    config = {
        "model": "flash/nano", "algorithm": "grpo", "environment": {"id": "local/long"}, "train": {"steps": steps}
    }  # fmt: skip
    new_run(database, LONG, config, created_at=began, step=steps, steps=steps)
    draw = random.Random(7)
    told = []
    for step in range(1, steps + 1):
        share = step / steps
        values = {
            "reward": share ** 0.5 + draw.gauss(0, 0.1), "reward_std": 0.3 * (1 - share), "kl": share * 0.02,
            "entropy": 1.2 - share + draw.gauss(0, 0.03), "length": 40 + 30 * math.sin(step / 9000), "truncated": 0.02,
            "learning_rate": 2e-5, "grad_norm": abs(draw.gauss(1, 0.4)), "tokens_per_s": 900 + draw.gauss(0, 40),
            "equal_groups": 0.2, "tokens": 4000.0, "turns": 1.0, "loss": draw.gauss(0, 0.02), "seconds": 0.4,
            "seconds_sampling": 0.25, "seconds_scoring": 0.05, "seconds_update": 0.1, "env/format": min(1.0, share * 2),
        }  # fmt: skip
        data = {"step": step, "total_steps": steps, "values": values}
        told.append(NewEvent(EventKind.METRICS, data, began + step, 1))
        if step % (steps // samples or 1) == 0:
            told.append(NewEvent(EventKind.SAMPLE, sample(step, step % 97, step), began + step, 1))
        if step % 100 == 0:
            line = {"stream": "trainer", "text": f"step {step}: all is well"}
            told.append(NewEvent(EventKind.LOG, line, began + step, 1))
    tell(database, LONG, told, now=began + steps)
    attempt(database, LONG, 1, began + 1, began + steps)
    with database.write() as connection:
        latest = {"metrics": told[-1].data.get("values") or values, "eval": {"base": 0.31, "adapter": 0.97, "n": 200}}
        connection.execute(schema.runs.update().where(schema.runs.c.id == LONG).values(**latest, active_s=float(steps)))
    end(database, LONG, RunState.DONE, at=began + steps)
    return LONG


def failed_run(database: Database, *, began: float = 1.7e9 + 100) -> str:
    """Two attempts: lost at step 60, taken up at step 50, failed by its environment at step 80."""
    config = {"model": "flash/nano", "environment": {"id": "local/flaky"}, "train": {"epochs": 3, "batch_size": 8}}
    new_run(database, FAILED, config, created_at=began, step=80, steps=120)
    told = []
    for epoch, first, last, start in ((1, 1, 60, began + 5), (2, 51, 80, began + 90)):
        for offset, phase in enumerate(("starting", "preparing environment", "loading model", "training")):
            told.append(NewEvent(EventKind.PHASE, {"phase": phase, "total_steps": 120}, start + 2 * offset, epoch))
        for step in range(first, last + 1):
            values = {"loss": 3 / step + (epoch - 1) * 0.01, "learning_rate": 3e-4 * (1 - step / 120)}
            data = {"step": step, "total_steps": 120, "values": values}
            told.append(NewEvent(EventKind.METRICS, data, start + 8 + step - first, epoch))
        if epoch == 1:
            saved = {"step": 50, "ref": f"{FAILED}/step-50", "final": False}
            told.append(NewEvent(EventKind.CHECKPOINT, saved, start + 58, epoch))
    tell(database, FAILED, told, now=began + 130)
    attempt(database, FAILED, 1, began + 5, began + 70, failure="infrastructure", message="the worker was lost")
    attempt(database, FAILED, 2, began + 90, began + 130, failure="user_code", message="KeyError: 'answer'")
    error = {
        "code": "user_code", "message": "environment.py line 12: KeyError: 'answer'",
        "remedy": "fix the environment; `flash env check` runs its reward on the gold answers",
        "detail": 'Traceback (most recent call last):\n  File "environment.py", line 12\nKeyError: \'answer\'',
    }  # fmt: skip
    with database.write() as connection:
        connection.execute(schema.runs.update().where(schema.runs.c.id == FAILED).values(error=error, active_s=105.0))
    end(database, FAILED, RunState.FAILED, at=began + 131)
    return FAILED


def hostile_run(database: Database, *, began: float = 1.7e9 + 200) -> str:
    """Everything that user code and a model may say, said with malice."""
    config = {
        "model": "flash/nano", "algorithm": "grpo", "environment": {"id": "local/hostile"},
        "worker_env": {"NOTE": MARKUP},
    }  # fmt: skip
    new_run(database, HOSTILE, config, created_at=began, step=3, steps=10)
    logged = [{"stream": "environment", "text": text} for text in HOSTILE_TEXTS.values()]
    told = [NewEvent(EventKind.LOG, line, began, 1) for line in logged]
    told.append(NewEvent(EventKind.WARNING, {"code": "x", "text": MARKUP}, began, 1))
    for step, (name, text) in enumerate(HOSTILE_TEXTS.items(), start=1):
        values = {"reward": float(step), f"env/{MARKUP}": 1.0}
        told.append(NewEvent(EventKind.METRICS, {"step": step, "total_steps": 10, "values": values}, began + step, 1))
        data = {
            "step": step, "kind": "rollout", "row": 0, "reward": 0.5, "rewards": [0.5, 1.0, "odd", None, {"a": MARKUP}],
            "messages": [{"role": MARKUP, "content": text}, {"role": "assistant", "content": [{"x": text}]}, 17],
            "text": f"<think>{text}</think>{text}", "success": False, "truncated": True, "name": name,
        }  # fmt: skip
        told.append(NewEvent(EventKind.SAMPLE, data, began + step, 1))
    tell(database, HOSTILE, told, now=began + 10)
    attempt(database, HOSTILE, 1, began, began + 9, failure="user_code", message=MARKUP)
    error = {"code": "user_code", "message": MARKUP, "remedy": MARKUP, "detail": HOSTILE_TEXTS["ansi"]}
    with database.write() as connection:
        query = schema.runs.update().where(schema.runs.c.id == HOSTILE)
        connection.execute(query.values(error=error, warnings=[MARKUP, HOSTILE_TEXTS["direction"]]))
    end(database, HOSTILE, RunState.FAILED, at=began + 10)
    return HOSTILE


def seed(home: Path, *, steps: int = STEPS, samples: int = SAMPLES) -> None:
    """All of them, into the database of a home whose server is not running."""
    home.mkdir(parents=True, exist_ok=True)
    database = Database(f"sqlite:///{home / 'flash.db'}")
    try:
        long_run(database, steps=steps, samples=samples)
        failed_run(database)
        hostile_run(database)
    finally:
        database.close()
