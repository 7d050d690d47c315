"""W&B's real package in its real offline mode, and a W&B that hangs or fails."""

import os
import time
from pathlib import Path

from flash.worker.wandb_sink import WandbSink


def sink(tmp_path: Path, warnings: list[str], finish_s: float = 60, **environ: str) -> WandbSink:
    return WandbSink(
        key="0" * 40,
        project="flash",
        run_name="a name",
        run_id="flash-1-00000000",
        config={"model": "flash/nano"},
        folder=tmp_path / "wandb",
        environ={**os.environ, **environ},
        warn=lambda code, text: warnings.append(code),
        finish_s=finish_s,
    )


def test_offline_run_holds_the_metrics(tmp_path: Path) -> None:
    warnings: list[str] = []
    wandb = sink(tmp_path, warnings, WANDB_MODE="offline")
    for step in range(1, 4):
        wandb.log(step, {"loss": 1.0 / step})
    wandb.summary({"eval/adapter": 0.93})
    wandb.close(wait_s=60)
    assert warnings == []
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    assert b"loss" in written and b"eval/adapter" in written and b"flash-1-00000000" in written and b"a name" in written
    assert b"0" * 40 not in written


def hanging_package(tmp_path: Path, body: str) -> str:
    package = tmp_path / "stand-in"
    package.mkdir()
    (package / "wandb.py").write_text(body)
    return str(package)


def test_a_hanging_wandb_costs_the_run_nothing(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = hanging_package(tmp_path, "import time\ndef init(**kwargs): time.sleep(600)\n")
    wandb = sink(tmp_path, warnings, finish_s=0.5, PYTHONPATH=path)
    started = time.monotonic()
    for step in range(30_000):
        wandb.log(step, {"loss": 0.5})
    wandb.close(wait_s=0.1)
    assert time.monotonic() - started < 5, "logging to a hanging W&B must not wait for it"
    assert "wandb_dropped" in warnings
    wandb.close(wait_s=10)  # its process ends by itself, `finish_s` after the stream
    assert "wandb_failed" in warnings


def test_a_failing_wandb_is_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = hanging_package(tmp_path, "def init(**kwargs): raise RuntimeError('no such account')\n")
    wandb = sink(tmp_path, warnings, PYTHONPATH=path)
    wandb.log(1, {"loss": 0.5})
    wandb.close(wait_s=30)
    assert warnings == ["wandb_failed"]
