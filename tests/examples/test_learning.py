"""Examples learn by reward alone: one seed closes at least half of the way to full reward.

The guessing game takes three minutes and stands in its README only.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from flash.catalog.catalog import load_catalog
from flash.config.load import parse_config
from flash.config.recipes import resolve
from flash.environments.loading import LocalEnvironment
from flash.inference.loading import load_base
from flash.inference.torch_engine import TorchEngine
from flash.training import grpo
from flash.training.checkpoints import ADAPTER
from flash.training.evaluation import evaluate
from flash.training.reporter import RecordingReporter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("letters-thinking", 40), ("calculator-agent", 30)])
def test_it_closes_half_of_the_way_to_full_reward(name: str, steps: int, tmp_path: Path) -> None:
    config, _ = parse_config(tomllib.loads((EXAMPLES / name / "grpo.toml").read_text(encoding="utf-8")))
    spec = resolve(config, seed=0)
    assert steps <= (spec.train.steps or 0)  # fewer steps than a run takes: the same up to there
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"steps": steps})})
    base = load_base(load_catalog().get("flash/nano").source, name="flash/nano", device="cpu")
    environment = LocalEnvironment(EXAMPLES / name, None, tmp_path)
    reporter = RecordingReporter()
    try:
        result = grpo.train(spec, base, environment, reporter, work_dir=tmp_path)
        assert result.checkpoint is not None
        engine = TorchEngine(base)
        report = evaluate(
            spec, base, engine, environment, reporter, result.checkpoint / ADAPTER, step=result.step
        )
        engine.close()
    finally:
        environment.close()
    assert report is not None, reporter.of("warning")
    assert report.base < 0.8  # there was something to learn
    assert report.adapter - report.base >= (1 - report.base) / 2, report
