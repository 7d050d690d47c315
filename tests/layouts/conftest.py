"""One checkpoint of every layout for the whole session, an environment, and the record of what was proved."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.layouts.checkpoints import LAYOUTS, Layout, save_checkpoint
from tests.layouts.proofs import RESULTS_VARIABLE
from tests.layouts.runs import ENVIRONMENT, Run

from flash.config.run import RunSpec
from flash.environments.loading import LocalEnvironment
from flash.inference.loading import BaseModel, load_base
from flash.training import grpo, sft
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult

torch.set_num_threads(1)

def slug(layout: Layout) -> str:
    return layout.name.lower().replace("/", "-").replace(" ", "-")


@pytest.fixture(params=LAYOUTS.values(), ids=slug)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_checkpoint(one, tmp_path_factory.mktemp(slug(one))) for name, one in LAYOUTS.items()}


@pytest.fixture
def folder(layout: Layout, checkpoints: dict[str, Path]) -> Path:
    """The layout's checkpoint, as it would lie in a cache."""
    return checkpoints[layout.name]


@pytest.fixture
def base(layout: Layout, folder: Path) -> BaseModel:
    """It, loaded as runs load it, under the name of a catalog model of its layout."""
    return load_base(folder, name=layout.models[-1], device="cpu")


@pytest.fixture
def train(base: BaseModel, tmp_path: Path) -> Iterator[Run]:
    """train(spec, name=…, turns=1, traces=False, reporter=…, **options): one run in this process."""
    opened: list[LocalEnvironment] = []

    def start(
        spec: RunSpec, *, name: str = "work", turns: int = 1, traces: bool = False,
        reporter: RecordingReporter | None = None, base: BaseModel = base, **options: Any,
    ) -> tuple[TrainResult, RecordingReporter]:  # fmt: skip
        reporter = reporter or RecordingReporter()
        package, work_dir = tmp_path / f"{name}-package", tmp_path / name
        (package / "dataset").mkdir(parents=True)
        work_dir.mkdir()
        (package / "environment.py").write_text(ENVIRONMENT)
        trace = "<think>\ncount\n</think>\n\n" if traces else ""
        rows = [{"input": f"{i}+{i}{'?' * (i % 4)}", "output": f"{trace}{2 * i}"} for i in range(10)]
        (package / "dataset" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        environment = LocalEnvironment(package, {"turns": turns} if turns > 1 else {}, work_dir)
        opened.append(environment)
        random.seed(0)  # as the trainer's process begins
        torch.manual_seed(0)
        algorithm = sft.train if spec.algorithm == "sft" else grpo.train
        return algorithm(spec, base, environment, reporter, work_dir=work_dir, **options), reporter

    yield start
    for environment in opened:
        environment.close()


# --- what docs/models.md may tick ---------------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    features = getattr(getattr(item, "function", None), "proves", ())
    path = os.environ.get(RESULTS_VARIABLE)
    if path and features and report.when == "call" and report.passed:
        name: str = item.callspec.params["layout"].name  # type: ignore[attr-defined]
        lines = [json.dumps({"layout": name, "feature": feature, "test": item.nodeid}) for feature in features]
        with Path(path).open("a", encoding="utf-8") as file:  # short appends: test processes may share the file
            file.write("".join(f"{line}\n" for line in lines))
