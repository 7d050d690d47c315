"""What a run will need and take on the hardware that this server can reach: refusal, micro-batch, time limit.

Owns the meeting of the catalog's arithmetic with real devices and a real package. Knows no HTTP.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from flash.artifacts.manifests import environment_key
from flash.catalog.catalog import ModelEntry
from flash.catalog.cost import Dataset, check_fit, estimate
from flash.catalog.fit import Kind, fits, fitted, memory_needed, most_tokens
from flash.catalog.hardware import HardwareClass, cpu_class, gpu_like
from flash.config.run import RunSpec
from flash.control_plane.services import Services
from flash.environments.package import unpack
from flash.environments.sizes import SplitSize, split_size
from flash.errors import FlashError, ModelError
from flash.launching.hardware import Device, apple_devices, cpu_device, cuda_devices
from flash.storage.runs import PricedRow

NEEDS = "needs"  # of a run's estimate: bytes of memory that it takes with its micro-batch, by kind of device
_KINDS: tuple[Kind, ...] = ("gpu", "cpu")
_LARGEST_PACKAGE = 8 << 20  # bytes of an archive that a submit opens to count its rows


@dataclass(frozen=True)
class Planned:
    """`spec` with a micro-batch that fits; `estimate` is None where the catalog's entry has no shape."""

    spec: RunSpec
    estimate: dict[str, Any] | None
    wall_clock_limit_s: float
    gpus: int | None  # that it takes; None: nothing is known of any device just now


def reachable(plane: Services) -> list[tuple[str, HardwareClass]]:
    """Each device of the launcher with what is known of it; devices of which nothing is are left out."""
    far = _described(plane)
    if far is None:
        local = _local_devices()
        found = [(name, local.get("cpu" if name.startswith("cpu") else name)) for name in _devices(plane)]
    else:  # whatever it would not place anything on just now: what is to be planned for will run later
        found = [(device.name, device) for device in far]
    prices = plane.settings.usd_per_hour
    return [(name, _priced(_class_of(device), prices)) for name, device in found if device is not None]


def _devices(plane: Services) -> list[str]:
    try:
        return plane.launcher.devices()
    except FlashError:
        return []


def _described(plane: Services) -> list[Device] | None:
    """What the launcher says of its own devices. None: they are this machine's."""
    try:
        return plane.launcher.describe()
    except FlashError:
        return []


def _priced(hardware: HardwareClass, prices: Mapping[str, float]) -> HardwareClass:
    """With the operator's price: of the device by name, or of its kind."""
    usd = prices.get(hardware.name, prices.get(hardware.kind))
    return hardware if usd is None else replace(hardware, usd_per_hour=usd)


@cache
def _local_devices() -> dict[str, Device]:
    """Asked once: neither memory nor GPUs come and go while a server runs."""
    apple = apple_devices(platform.system(), platform.machine())
    return {device.name: device for device in [cpu_device(), *cuda_devices(), *apple]}


def _class_of(device: Device) -> HardwareClass:
    if not device.name.startswith("cuda"):  # nobody has measured an Apple GPU; a run may fall back to its processor
        return cpu_class(memory=device.memory, cores=device.cores or os.cpu_count() or 1, name=device.kind)
    return gpu_like(device.kind, device.memory)


def plan_run(plane: Services, spec: RunSpec, entry: ModelEntry, size: SplitSize | None) -> Planned:
    """`size` is of the package's own rows, where there are some (`packaged_rows`).

    Raises InvalidInput, with need, have and the key to lower, when no reachable device can ever fit the run.

    Where nothing can be told, of the model or of the devices, nothing is refused.
    """
    settings = plane.settings
    unknown = max(settings.wall_clock_min_s, settings.wall_clock_unknown_s)
    known = reachable(plane)
    classes = [hardware for _, hardware in known]
    gpus = _gpus([*(name for name, _ in known), *_devices(plane)])
    try:
        check_fit(spec, entry, classes)
    except ModelError:
        return Planned(spec, None, unknown, gpus)
    fitting = [hardware for hardware in classes if fits(spec, entry, hardware)]
    if not fitting:
        return Planned(spec, None, unknown, gpus)
    found = estimate(spec, entry, min(fitting, key=lambda hardware: hardware.flops), _dataset(size, spec, entry))
    limit = max(settings.wall_clock_min_s, settings.wall_clock_factor * found.limit_base_s)
    if spec.algorithm == "sft" and size is None and not (spec.train.max_examples or spec.train.max_steps):
        limit = max(limit, unknown)  # rows made in code: nobody knows how many
    sized = _sized(spec, entry, fitting)
    needs = {kind: memory_needed(sized, entry, kind).total for kind in _KINDS}
    return Planned(sized, {**found.document(), NEEDS: needs}, limit, gpus)


def _gpus(names: Sequence[str]) -> int | None:
    """How many a run takes: one, where there are others than processors. None: there is nothing to tell by."""
    return int(any(not name.startswith("cpu") for name in names)) if names else None


def _sized(spec: RunSpec, entry: ModelEntry, classes: list[HardwareClass]) -> RunSpec:
    """With micro-batches that fit the tightest of the devices. The gradient does not depend on the split."""
    tokens = min(fitted(spec, entry, hardware).micro_batch_tokens for hardware in classes)
    if tokens >= most_tokens(spec):
        return spec
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"micro_batch_tokens": tokens})})


def _dataset(size: SplitSize | None, spec: RunSpec, entry: ModelEntry) -> Dataset | None:
    if size is None:
        return None
    return Dataset.of_text(entry, size.rows, size.input + (size.output if spec.algorithm == "sft" else 0.0))


def serving_needs(entry: ModelEntry) -> dict[str, int]:
    """Bytes that an engine needs at least, by kind of device: the base's weights, bf16 or fp32."""
    return {"gpu": 2 * entry.params, "cpu": 4 * entry.params}


def packaged_rows(plane: Services, sha256: str, size: int, params: Mapping[str, Any]) -> SplitSize | None:
    """The rows that a pushed package ships for these params; not to be asked inside a transaction: it unpacks."""
    if size > _LARGEST_PACKAGE:
        return None
    try:
        archive = plane.store.get_bytes(environment_key(sha256))
        with tempfile.TemporaryDirectory() as folder:
            unpack(archive, Path(folder))
            return split_size(Path(folder), params)
    except (FlashError, OSError):  # an estimate is not worth a submit
        return None


# --- what a run cost --------------------------------------------------------------------------------------


def estimated_usd(run: PricedRow) -> float | None:
    return None if run.estimate is None else float(run.estimate["usd"])


def cost_usd(run: PricedRow) -> float | None:
    """By the time under a worker's lease; of a cancelled run by the steps that it reached."""
    if run.estimate is None:
        return None
    seconds = run.active_s
    if run.state.value == "cancelled":
        seconds = min(seconds, run.step * float(run.estimate["seconds_per_step"]))
    return round(seconds / 3600 * float(run.estimate["usd_per_hour"]), 4)
