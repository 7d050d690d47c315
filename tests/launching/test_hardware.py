from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flash.errors import Unavailable
from flash.launching.fake import FakeLauncher
from flash.launching.hardware import Device, apple_devices, local_devices, parse_cuda
from flash.launching.launcher import LaunchRequest, Probe

TABLE = """0, GPU-aa11, NVIDIA H200, 143771
1, GPU-bb22, NVIDIA L4, 23034
garbage
"""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["cuda:0", "cuda:1"]),
        ("0,1", ["cuda:0", "cuda:1"]),
        ("1", ["cuda:1"]),
        ("GPU-aa", ["cuda:0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_devices_are_those_that_the_environment_shows(visible: str | None, names: list[str]):
    assert [device.name for device in parse_cuda(TABLE, visible)] == names


def test_memory_is_in_bytes():
    assert parse_cuda(TABLE, "1") == [Device("cuda:1", "NVIDIA L4", 23034 * 1024 * 1024)]


def fake_tool(folder: Path, script: str) -> str:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_machine_with_a_driver_offers_its_gpus_and_one_without_its_cpu(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", fake_tool(tmp_path, 'echo "0, GPU-aa, NVIDIA L4, 23034"'))
    assert [device.name for device in local_devices()] == ["cuda:0"]
    monkeypatch.setenv("PATH", fake_tool(tmp_path, "exit 9"))
    (cpu,) = local_devices()
    assert cpu.name == "cpu" and cpu.memory > 1 << 28


def test_the_fake_launcher_keeps_the_launchers_contract():
    fake = FakeLauncher(("cpu",))
    request = LaunchRequest("run.1", "http://x", "t", "/w", "cpu")
    handle = fake.launch(request)
    assert fake.launch(request) == handle and fake.list() == {"run.1": handle}
    fake.reachable = False
    assert fake.probe(handle) is Probe.UNKNOWN and fake.list() == {}
    with pytest.raises(Unavailable):
        fake.launch(request)
    fake.reachable = True
    fake.kill(handle)
    assert fake.probe(handle) is Probe.DEAD and fake.list() == {}
    assert fake.launch(request) != handle


def test_an_apple_silicon_mac_offers_its_gpu():
    assert [device.name for device in apple_devices("Darwin", "arm64")] == ["mps"]
    assert apple_devices("Darwin", "x86_64") == apple_devices("Linux", "aarch64") == []
