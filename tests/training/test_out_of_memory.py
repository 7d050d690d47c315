"""Running out of memory: told from other faults, and gone on from at the same step with less at a time.

The devices here have room for so many tokens in a forward pass: beyond, torch is asked for more memory than there
is, and says so itself. `short_of_memory.py` is a process that really has too little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.training.test_grpo import grpo_spec, package

from flash.config.run import RunSpec
from flash.environments.loading import LocalEnvironment
from flash.errors import OutOfMemory
from flash.inference.engine import Request, Sampling
from flash.inference.loading import BaseModel
from flash.inference.memory import is_out_of_memory
from flash.inference.torch_engine import TorchEngine
from flash.training import grpo, sft
from flash.training.fitting import MicroBatches, with_less
from flash.training.reporter import RecordingReporter
from flash.training.sft import TrainResult

HUGE = 1 << 58  # bytes that no machine has


def run_out() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


@contextmanager
def room_for(base: BaseModel, *, training: int | None = None, decoding: int | None = None) -> Iterator[list[int]]:
    """A device with room for `training` tokens in a pass that leads to a gradient, `decoding` rows in a step of the
    sampler. Gives the sizes of the passes that fitted."""
    fitted: list[int] = []

    def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        tokens = inputs[0]
        sampling = torch.is_inference_mode_enabled() and tokens.dim() == 1
        room = training if torch.is_grad_enabled() else decoding if sampling else None
        if room is not None and tokens.numel() > room:
            run_out()
        if torch.is_grad_enabled():
            fitted.append(tokens.numel())

    hook = base.model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield fitted
    finally:
        hook.remove()


@pytest.fixture
def run(
    base: BaseModel, environment: LocalEnvironment, tmp_path: Path
) -> Iterator[Callable[..., tuple[TrainResult, RecordingReporter]]]:
    opened = []

    def start(spec: RunSpec, name: str, reporter: RecordingReporter | None = None, **options: object) -> tuple:
        reporter = reporter or RecordingReporter()
        folder = tmp_path / name
        folder.mkdir()
        if spec.algorithm == "sft":
            return sft.train(spec, base, environment, reporter, work_dir=folder, **options), reporter
        opened.append(LocalEnvironment(package(folder / "package"), {}, folder))
        return grpo.train(spec, base, opened[-1], reporter, work_dir=folder, **options), reporter

    yield start
    for each in opened:
        each.close()


def memory_warnings(reporter: RecordingReporter) -> list[str]:
    return [data["text"] for data in reporter.of("warning") if data["code"] == "out_of_memory"]


def numbers(reporter: RecordingReporter) -> list[int]:
    return [data["step"] for data in reporter.of("metrics") if "loss" in data["values"]]


def gap(one: TrainResult, other: TrainResult) -> float:
    ours, theirs = (
        load_file(result.checkpoint / "adapter" / "adapter_model.safetensors") for result in (one, other)
    )
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def micro_batch_tokens(result: TrainResult) -> int:
    return json.loads((result.checkpoint / "state" / "state.json").read_text())["extra"]["micro_batches"]["tokens"]


# --- which errors these are -----------------------------------------------------------------------------------


def test_memory_that_runs_out_is_told_from_other_faults() -> None:
    with pytest.raises(RuntimeError) as caught:
        run_out()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(OSError(12, os.strerror(12)))
    assert is_out_of_memory(SafetensorError("Cannot allocate memory (os error 12)"))
    assert is_out_of_memory(RuntimeError("unable to mmap 1744392 bytes from file <w>: Cannot allocate memory (12)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    for other in (RuntimeError("shapes differ"), OSError(28, os.strerror(28)), KeyError("out of memory")):
        assert not is_out_of_memory(other)


def test_other_faults_pass_and_a_retreat_ends() -> None:
    def fails() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        with_less(fails, what="step 1", shrink=lambda: "less", warn=lambda code, text: None)
    left, told = [3], []

    def shrink() -> str | None:
        left[0] -= 1
        return f"{left[0]} left" if left[0] else None

    with pytest.raises(OutOfMemory, match=r"step 1 does not fit into memory: .*allocate") as caught:
        with_less(run_out, what="step 1", shrink=shrink, warn=lambda code, text: told.append((code, text)))
    assert "max_length" in (caught.value.remedy or "")
    assert told == [("out_of_memory", f"step 1 did not fit into memory; {n} left") for n in (2, 1)]


@settings(max_examples=15)  # each attempt collects garbage, which takes its time
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    planned=st.integers(1, 40_000),
    room=st.integers(1, 30_000),
)
def test_micro_batches_shrink_until_they_fit_or_a_row_stands_alone(
    lengths: list[int], planned: int, room: int
) -> None:
    micro = MicroBatches(planned)
    tried: list[int] = []

    def work() -> int:
        largest = max(min(micro.tokens, max(lengths) * len(lengths)), max(lengths))
        assert largest not in tried  # each attempt needs less than those before
        tried.append(largest)
        if largest > room:
            raise MemoryError
        return largest

    if max(lengths) > room:
        with pytest.raises(OutOfMemory):
            micro.fitting(work, lengths, what="a step")
    else:
        assert micro.fitting(work, lengths, what="a step") > min(room, planned, tried[0]) // 2 - 1
        assert micro.tokens <= planned


# --- runs -----------------------------------------------------------------------------------------------------


def test_sft_goes_on_from_the_same_step_with_smaller_micro_batches(base, run, spec) -> None:
    whole, _ = run(spec(epochs=2), "whole")
    with room_for(base, training=100) as fitted:
        small, reporter = run(spec(epochs=2), "small")
    assert small.step == whole.step and numbers(reporter) == list(range(1, whole.step + 1))
    told = memory_warnings(reporter)
    assert told[0].startswith("step 1 did not fit into memory; going on with micro-batches of") and len(told) < 4
    assert max(fitted) <= 100
    assert gap(small, whole) < 1e-5
    assert micro_batch_tokens(small) <= 100 < micro_batch_tokens(whole)


def test_a_resumed_run_goes_on_with_what_fitted_and_ends_with_the_same_bytes(base, run, spec) -> None:
    with room_for(base, training=130):
        whole, _ = run(spec(epochs=2), "whole")
        part, _ = run(spec(epochs=2), "part", RecordingReporter(stop_at=3))
        rest, reporter = run(spec(epochs=2), "rest", resume_from=part.checkpoint)
    assert not memory_warnings(reporter)
    names = ("adapter/adapter_model.safetensors", "state/optimizer.safetensors")
    assert all((rest.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes() for name in names)


def test_a_row_that_does_not_fit_alone_ends_the_attempt(base, run, spec) -> None:
    reporter = RecordingReporter()
    with room_for(base, training=20), pytest.raises(OutOfMemory, match="step 1 does not fit into memory"):
        run(spec(), "small", reporter)
    assert "each layer computed again" in memory_warnings(reporter)[-1]


@pytest.mark.parametrize("keys", [{}, {"kl_penalty_coef": 0.1}])
def test_grpo_updates_with_smaller_micro_batches(keys, base, run) -> None:
    whole, before = run(grpo_spec(**keys), "whole")
    with room_for(base, training=150) as fitted:
        small, reporter = run(grpo_spec(**keys), "small")
    assert numbers(reporter) == [1, 2, 3, 4] and max(fitted) <= 150
    assert all("the update of step" in text for text in memory_warnings(reporter)) and memory_warnings(reporter)
    assert gap(small, whole) < 1e-5
    rewards = [[data["values"]["reward"] for data in each.of("metrics")] for each in (before, reporter)]
    assert rewards[0] == rewards[1]


def test_grpo_samples_fewer_at_a_time(base, run) -> None:
    whole, before = run(grpo_spec(), "whole")
    with room_for(base, decoding=4):
        small, reporter = run(grpo_spec(), "small")
    assert memory_warnings(reporter) == [
        f"sampling for step 1 did not fit into memory; going on with {rows} samples at a time" for rows in (6, 3)
    ]
    rewards = [[data["values"]["reward"] for data in each.of("metrics")] for each in (before, reporter)]
    assert rewards[0] == rewards[1] and gap(small, whole) < 1e-5


def test_an_engine_after_an_attempt_without_memory_decodes_less_at_a_time(base: BaseModel) -> None:
    requests = [Request((5, 6, 7 + k), Sampling(max_tokens=4, seed=k), n=4) for k in range(3)]
    whole = TorchEngine(base).generate(requests)
    with room_for(base, decoding=4):
        halved = TorchEngine(base, max_rows=8, divisor=2)
        assert [[c.tokens for c in group] for group in halved.generate(requests)] == [
            [c.tokens for c in group] for group in whole
        ]
    assert (halved.shrink(), halved.shrink(), halved.shrink()) == (2, 1, None)


@pytest.mark.slow
def test_a_process_with_too_little_memory_gets_through(tmp_path: Path) -> None:
    script = Path(__file__).with_name("short_of_memory.py")
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["warnings"] and all("did not fit into memory" in text for text in told["warnings"])
    assert told["steps"] == [1, 2, 3] and told["gap"] < 1e-4
