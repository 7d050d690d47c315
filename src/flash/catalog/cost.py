"""How long a run takes on a device, and what that costs: `flash train --cost` and the time limit of runs.

Owns the arithmetic and its stated assumptions. Pure and deterministic: a spec, a catalog entry, a device and the
number of rows in; seconds and dollars out. An estimate is for planning. It leaves out what nobody can know before:
how long an environment's own code takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flash.catalog.catalog import ModelEntry
from flash.catalog.fit import MemoryEstimate, choose, decoding_rows, fits, fitted, gigabytes, too_large
from flash.catalog.hardware import HardwareClass
from flash.catalog.shapes import body_parameters, cache_bytes, shape_of, working_adapter_parameters
from flash.config.run import RunSpec

# Shares of a device's data-sheet speed that training and decoding reach, and seconds that a layer takes however
# little there is to compute (kernel launches, Python). Chosen from what eager transformers models are known to
# reach; the benchmarks' figures replace them where there are some.
TRAINING_EFFICIENCY = {"gpu": 0.25, "cpu": 1.0}  # a CPU's speed is already what it reaches (hardware.py)
DECODING_EFFICIENCY = {"gpu": 0.5, "cpu": 1.0}
LAYER_TRAINING_S = {"gpu": 1.5e-3, "cpu": 1e-3}
LAYER_DECODING_S = {"gpu": 0.8e-3, "cpu": 0.3e-3}

ASSUMED_ROWS = 1000
CHARACTERS_A_TOKEN = 4.0
TEMPLATE_TOKENS = 16  # a chat template's marks around a prompt and an answer
_BYTE_LEVEL = 1024  # vocabularies up to this size have little beside single bytes
FILLED = 0.5  # of max_length, by the average row whose length is unknown
EVALUATION_ROWS, EVALUATION_TOKENS = 200, 512
START_S = {"gpu": 60.0, "cpu": 20.0}  # process, environment, first batch
LOADING_BYTES_S = 1e9  # weights from a local disk

# The time limit must end runs that hang, never one that is only slower than expected. A CPU's speed is a guess, and
# it may be shared: several times slower is an honest run. Environment code (a judge model, a sandbox) and a
# download of the weights are in no estimate, so the limit allows for them.
SLOWER = {"gpu": 4.0, "cpu": 20.0}
ENVIRONMENT_STEP_S = 60.0
ENVIRONMENT_ROW_S = 0.1
PREPARATION_S = 600.0
DOWNLOAD_BYTES_S = 20e6


@dataclass(frozen=True)
class Dataset:
    """What is known of the rows. `tokens` is the mean length of a prompt with its target; in GRPO, of a prompt."""

    rows: int | None = None
    tokens: float | None = None

    @classmethod
    def of_text(cls, entry: ModelEntry, rows: int, characters: float) -> Dataset:
        """From the mean characters of what becomes tokens: four a token, one with a byte-level vocabulary."""
        a_token = 1.0 if shape_of(entry).vocab <= _BYTE_LEVEL else CHARACTERS_A_TOKEN
        return cls(rows, characters / a_token + TEMPLATE_TOKENS)


@dataclass(frozen=True)
class CostEstimate:
    """Seconds and dollars of a whole run on one device. `sampling_s` and `training_s` are of one step."""

    hardware: HardwareClass
    memory: MemoryEstimate
    rows: int
    steps: int
    tokens_per_step: int
    sampling_s: float
    training_s: float
    start_s: float
    evaluation_s: float
    limit_base_s: float  # the same, for the time limit: with every allowance
    assumptions: tuple[str, ...]

    @property
    def step_s(self) -> float:
        return self.sampling_s + self.training_s

    @property
    def wall_clock_s(self) -> float:
        return self.start_s + self.steps * self.step_s + self.evaluation_s

    @property
    def usd(self) -> float:
        return self.wall_clock_s / 3600 * self.hardware.usd_per_hour

    def document(self) -> dict[str, Any]:
        """JSON-ready; rounded, so that equal inputs read equal."""
        return {
            "hardware": self.hardware.name,
            "usd_per_hour": self.hardware.usd_per_hour,
            "hardware_memory_bytes": self.hardware.memory,
            "memory_bytes": self.memory.total,
            "memory_parts": self.memory.parts,
            "micro_batch_tokens": self.memory.micro_batch_tokens,
            "rows": self.rows,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "seconds_per_step": _rounded(self.step_s),
            "sampling_s": _rounded(self.sampling_s),
            "training_s": _rounded(self.training_s),
            "start_s": _rounded(self.start_s),
            "evaluation_s": _rounded(self.evaluation_s),
            "wall_clock_s": _rounded(self.wall_clock_s),
            "usd": _rounded(self.usd),
            "assumptions": list(self.assumptions),
        }


def _rounded(value: float) -> float:
    """Four significant digits: an estimate knows no more."""
    return float(f"{value:.4g}")


def estimate(
    spec: RunSpec, entry: ModelEntry, hardware: HardwareClass, dataset: Dataset | None = None
) -> CostEstimate:
    """Of a run on this device, whether it fits there or not; ModelError for an entry without a shape."""
    dataset = dataset or Dataset()
    assumptions: list[str] = []
    memory = fitted(spec, entry, hardware)
    rows = _rows(spec, dataset, assumptions)
    steps = _steps(spec, rows)
    length = _length(spec, dataset, assumptions)
    samples = min(spec.train.batch_size, rows) if spec.algorithm == "sft" else spec.train.batch_size
    samples *= spec.train.group_size or 1
    tokens = math.ceil(samples * length)
    training = _training_s(spec, entry, hardware, tokens, length, memory.micro_batch_tokens)
    sampling = 0.0
    if spec.algorithm == "grpo":
        sampling = _decoding_s(entry, hardware, samples, decoding_rows(spec), spec.train.max_tokens or 1, length)
        assumptions.append(f"every completion fills max_tokens = {spec.train.max_tokens}; episodes have one turn")
        assumptions.append("the environment's own code takes no time")
    answers = min(spec.train.max_tokens or EVALUATION_TOKENS, spec.train.max_length)
    scored = min(EVALUATION_ROWS, rows)
    evaluation = 2 * _decoding_s(entry, hardware, scored, scored, answers, length)
    assumptions.append(f"at the end, base and adapter each answer {scored} held-out rows")
    start = START_S[hardware.kind] + memory.weights / LOADING_BYTES_S
    if entry.path is None:
        assumptions.append(f"the model's {gigabytes(2 * entry.params)} are on the machine already")
    return CostEstimate(
        hardware=hardware,
        memory=memory,
        rows=rows,
        steps=steps,
        tokens_per_step=tokens,
        sampling_s=sampling,
        training_s=training,
        start_s=start,
        evaluation_s=evaluation,
        limit_base_s=_limit_base(spec, entry, hardware, rows, steps * (sampling + training) + evaluation),
        assumptions=tuple(assumptions),
    )


def _limit_base(spec: RunSpec, entry: ModelEntry, hardware: HardwareClass, rows: int, busy_s: float) -> float:
    scoring = rows * ENVIRONMENT_ROW_S
    if spec.algorithm == "grpo":
        scoring += (spec.train.steps or 1) * ENVIRONMENT_STEP_S
    return PREPARATION_S + 2 * entry.params / DOWNLOAD_BYTES_S + scoring + SLOWER[hardware.kind] * busy_s


def plan(
    spec: RunSpec, entry: ModelEntry, classes: Iterable[HardwareClass], dataset: Dataset | None = None
) -> tuple[CostEstimate, list[CostEstimate]]:
    """The estimate on the cheapest class that fits, and on every other one that does, cheapest run first.

    Raises InvalidInput, naming the key to lower, when the run fits on none.
    """
    known = list(classes)
    chosen = choose(spec, entry, known)
    found = [estimate(spec, entry, hardware, dataset) for hardware in known if fits(spec, entry, hardware)]
    others = [other for other in found if other.hardware != chosen]
    return next(each for each in found if each.hardware == chosen), sorted(others, key=lambda each: each.usd)


def check_fit(spec: RunSpec, entry: ModelEntry, classes: Iterable[HardwareClass]) -> None:
    """InvalidInput, with need, have and the key to lower, when no class can ever fit the run."""
    known = list(classes)
    if known and not any(fits(spec, entry, hardware) for hardware in known):
        raise too_large(spec, entry, known)


# --- how much there is to do --------------------------------------------------------------------------------


def _rows(spec: RunSpec, dataset: Dataset, assumptions: list[str]) -> int:
    most = spec.train.max_examples or 0
    if dataset.rows is not None:
        return max(1, min(dataset.rows, most) if most else dataset.rows)
    if most:
        assumptions.append(f"the dataset has the {most:,} rows of train.max_examples")
        return most
    assumptions.append(f"the dataset has {ASSUMED_ROWS:,} rows (its size is not known here)")
    return ASSUMED_ROWS


def _steps(spec: RunSpec, rows: int) -> int:
    if spec.algorithm == "grpo":
        return spec.train.steps or 1
    steps = (spec.train.epochs or 1) * -(-rows // spec.train.batch_size)
    return min(steps, spec.train.max_steps) if spec.train.max_steps else steps


def _length(spec: RunSpec, dataset: Dataset, assumptions: list[str]) -> float:
    """Mean tokens of a whole sequence."""
    longest = spec.train.max_length
    if spec.algorithm == "sft":
        if dataset.tokens is not None:
            return max(1.0, min(dataset.tokens, longest))
        assumptions.append(f"rows average half of max_length = {longest}")
        return max(1.0, FILLED * longest)
    answer = min(spec.train.max_tokens or 1, longest)
    if dataset.tokens is not None:
        return max(1.0, min(dataset.tokens + answer, longest))
    assumptions.append(f"prompts average half of what max_length = {longest} leaves beside max_tokens")
    return max(1.0, answer + FILLED * (longest - answer))


# --- how fast ---------------------------------------------------------------------------------------------


def _training_s(
    spec: RunSpec, entry: ModelEntry, hardware: HardwareClass, tokens: int, length: float, micro_batch: int
) -> float:
    """Forward and backward through a frozen base take 4 operations a parameter and token, the adapter 6."""
    shape = shape_of(entry)
    per_token = 4 * (body_parameters(entry) + shape.vocab * shape.hidden)
    per_token += 6 * working_adapter_parameters(entry, spec.train.lora_rank)
    # scores and mixing of every full layer, over half the sequence on average, forward and twice backward
    attention = 3 * 4 * shape.full_layers * shape.heads * shape.head_dim * length / 2
    busy = tokens * (per_token + attention) / (hardware.flops * TRAINING_EFFICIENCY[hardware.kind])
    passes = max(1, math.ceil(tokens / micro_batch))
    return busy + passes * shape.layers * LAYER_TRAINING_S[hardware.kind]


def _decoding_s(
    entry: ModelEntry, hardware: HardwareClass, samples: int, together: int, tokens: int, length: float
) -> float:
    """Waves of rows, each decoding `tokens` times; a step reads weights and cache, or computes, whichever is longer."""
    shape = shape_of(entry)
    width = 2 if hardware.kind == "gpu" else 4
    rows = max(1, min(together, samples))
    of_token, of_row = cache_bytes(entry, width)
    work = body_parameters(entry) + shape.vocab * shape.hidden
    # rows choose different experts: many rows read more of them
    read = width * min(entry.params, work * rows if entry.experts else work)
    moved = read + rows * (length * of_token + 2 * of_row)
    moving = moved / (hardware.bandwidth * DECODING_EFFICIENCY[hardware.kind])
    computing = 2 * work * rows / (hardware.flops * TRAINING_EFFICIENCY[hardware.kind])
    step = max(moving, computing) + shape.layers * LAYER_DECODING_S[hardware.kind]
    return math.ceil(samples / rows) * tokens * step
