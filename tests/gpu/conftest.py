"""The device that these tests run on; README.md says how to choose it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.layouts.checkpoints import LAYOUTS, Layout, save_checkpoint
from tests.training.conftest import write_package
from tests.training.test_grpo import package

from flash.catalog.catalog import load_catalog
from flash.config.run import RunSpec
from flash.environments.loading import LocalEnvironment
from flash.inference.loading import BaseModel, load_base
from flash.training import grpo, sft
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult
from flash.worker.trainer import make_repeatable

HERE = Path(__file__).parent
CHOSEN = os.environ.get("FLASH_TEST_DEVICE", "cuda:0")
Run = Callable[..., tuple[TrainResult, RecordingReporter]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = CHOSEN.startswith("cuda") and not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(900))
            if missing:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(CHOSEN)


@pytest.fixture
def on_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA can tell")


@pytest.fixture(scope="session")
def load(device: torch.device) -> Callable[..., BaseModel]:
    """load(folder, name=…): a base as a GPU has it, in bf16, also where the device is a processor."""

    def loaded(folder: Path, *, name: str, **options: Any) -> BaseModel:
        return load_base(folder, name=name, device=str(device), dtype=torch.bfloat16, **options)

    return loaded


@pytest.fixture
def nano(load: Callable[..., BaseModel]) -> BaseModel:
    return load(Path(str(load_catalog().get("flash/nano").source)), name="flash/nano")


@pytest.fixture(params=LAYOUTS.values(), ids=lambda layout: layout.name.lower().replace("/", "-").replace(" ", "-"))
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_checkpoint(one, tmp_path_factory.mktemp("model")) for name, one in LAYOUTS.items()}


@pytest.fixture
def base(layout: Layout, checkpoints: dict[str, Path], load: Callable[..., BaseModel]) -> BaseModel:
    return load(checkpoints[layout.name], name=layout.models[-1])


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Run]:
    """train(base, spec, name=…, folder=…, stop_at=…, **options): one run in this process, on rows of its own or on an
    environment's folder."""
    opened: list[LocalEnvironment] = []

    def start(
        base: BaseModel,
        spec: RunSpec,
        *,
        name: str = "work",
        folder: Path | None = None,
        stop_at: int | None = None,
        **options: Any,
    ) -> tuple[TrainResult, RecordingReporter]:
        work_dir, reporter = tmp_path / name, RecordingReporter(stop_at=stop_at)
        work_dir.mkdir()
        if folder is None:
            make = package if spec.algorithm == "grpo" else write_package
            folder = make(work_dir / "package", rows=16)
        make_repeatable(spec.seed, threads=torch.get_num_threads())
        opened.append(LocalEnvironment(folder, {}, work_dir))
        algorithm = sft.train if spec.algorithm == "sft" else grpo.train
        return algorithm(spec, base, opened[-1], reporter, work_dir=work_dir, **options), reporter

    yield start
    torch.use_deterministic_algorithms(False)
    for environment in opened:
        environment.close()


def steps(reporter: RecordingReporter) -> list[dict[str, float]]:
    return [data["values"] for data in reporter.of("metrics")]
