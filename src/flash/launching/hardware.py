"""What this machine can place attempts on: CUDA devices by asking the driver's own tool, an Apple GPU, or the CPU.

Loads no torch, so that the control plane can ask.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_QUERY = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_MIB = 1 << 20
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Device:
    """`name` is what a launcher places attempts on ("cpu", "cuda:0"); `memory` is in bytes."""

    name: str
    kind: str
    memory: int
    cores: int = 0  # of a CPU, as far as an attempt may use them; 0: this machine's


def local_devices() -> list[Device]:
    """The machine's GPUs, as far as CUDA_VISIBLE_DEVICES shows them, or else its CPU."""
    return cuda_devices() or apple_devices(platform.system(), platform.machine()) or [cpu_device()]


def apple_devices(system: str, machine: str) -> list[Device]:
    """The GPU of an Apple-silicon Mac, which shares the machine's memory. The trainer checks its numbers before
    it relies on it, and falls back to the CPU."""
    if (system, machine) != ("Darwin", "arm64"):
        return []
    return [Device("mps", "Apple GPU", int(psutil.virtual_memory().total))]


def cpu_device() -> Device:
    """The processor, with the machine's memory or what the container may have of it."""
    memory = int(psutil.virtual_memory().total)
    for path in _CONTAINER_LIMITS:
        try:
            memory = min(memory, int(path.read_text()))
        except (OSError, ValueError):  # no such limit ("max")
            continue
    return Device("cpu", "CPU", memory)


def cuda_devices() -> list[Device]:
    """GPUs by their index in the driver's list; empty where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_cuda(answer.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_cuda(table: str, visible: str | None) -> list[Device]:
    """Devices from the tool's table: index, uuid, name, MiB a line. `visible` lists indices or uuids."""
    wanted = None if visible is None else [part.strip() for part in visible.split(",")]
    found = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4 or not fields[0].isdigit() or not fields[3].isdigit():
            continue
        index, uuid, name, mib = fields
        if wanted is None or index in wanted or any(part and uuid.startswith(part) for part in wanted):
            found.append(Device(f"cuda:{index}", name, int(mib) * _MIB))
    return found
