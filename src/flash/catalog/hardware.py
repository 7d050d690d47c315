"""Accelerator classes with memory, speed and reference prices, for planning.

Owns the reading of `hardware.toml`, and the form in which estimates read a piece of hardware. It does not
know what this installation can reach: launchers do.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from flash.catalog.catalog import Provenance

# What a core of an ordinary laptop gets out of small fp32 matrix products while other programs run.
CORE_FLOPS = 6e9
CPU_BANDWIDTH = 10e9  # bytes a second
_LAPTOP_CORES, _LAPTOP_MEMORY = 4, 16 * 10**9


@dataclass(frozen=True)
class HardwareClass:
    """What an estimate needs to know of one device. Memory in bytes, speeds a second, dollars an hour."""

    name: str
    kind: Literal["gpu", "cpu"]
    memory: int
    flops: float
    bandwidth: float
    usd_per_hour: float = 0.0


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Price(_Fact):
    """What one GPU cost for an hour, where, when, and who says so."""

    provider: str
    usd: float | tuple[float, float]  # one figure, or lowest and highest
    date: str = Field(pattern=r"^\d{4}-\d{2}$")
    source: str

    @property
    def middle(self) -> float:
        return self.usd if isinstance(self.usd, float) else sum(self.usd) / 2


class GpuClass(_Fact):
    name: str
    memory_gb: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    bandwidth_tb_s: float = Field(gt=0)
    facts: Provenance
    rough: bool = False
    prices: tuple[Price, ...] = Field(min_length=1)

    @property
    def usd_per_hour(self) -> float:
        """The price to plan with: the median over the captured ones."""
        return round(median(price.middle for price in self.prices), 2)

    @property
    def hardware(self) -> HardwareClass:
        """For estimates. Gigabytes are read as 10^9 bytes: what a driver keeps for itself is left out so."""
        return HardwareClass(
            name=self.name,
            kind="gpu",
            memory=int(self.memory_gb * 1e9),
            flops=self.bf16_tflops * 1e12,
            bandwidth=self.bandwidth_tb_s * 1e12,
            usd_per_hour=self.usd_per_hour,
        )


@cache
def gpu_classes() -> tuple[GpuClass, ...]:
    """All classes, cheapest first."""
    document = tomllib.loads(Path(__file__).with_name("hardware.toml").read_text(encoding="utf-8"))
    return tuple(sorted(map(GpuClass.model_validate, document["gpu"]), key=lambda gpu: gpu.usd_per_hour))


def cpu_class(*, memory: int, cores: int, name: str = "CPU") -> HardwareClass:
    """A machine's own processor: its hours cost nothing."""
    return HardwareClass(name=name, kind="cpu", memory=memory, flops=cores * CORE_FLOPS, bandwidth=CPU_BANDWIDTH)


def laptop() -> HardwareClass:
    """The CPU to plan with, the same whoever asks: four cores, 16 GB."""
    return cpu_class(memory=_LAPTOP_MEMORY, cores=_LAPTOP_CORES, name=f"CPU ({_LAPTOP_CORES} cores)")


def gpu_like(name: str, memory: int) -> HardwareClass:
    """A GPU that a driver reports, with the speed of the class that it looks like; of the slowest if of none.

    On hardware of one's own an hour has no price.
    """
    words = {*name.upper().replace("-", " ").split(), "SXM"}  # drivers write it only sometimes
    known = [gpu for gpu in gpu_classes() if words.issuperset(gpu.name.upper().split())]
    model = known[0] if known else min(gpu_classes(), key=lambda gpu: gpu.bf16_tflops)
    hardware = model.hardware
    return HardwareClass(name=name, kind="gpu", memory=memory, flops=hardware.flops, bandwidth=hardware.bandwidth)
