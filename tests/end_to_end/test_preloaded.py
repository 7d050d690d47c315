"""A worker that was forked trains as one that was started afresh: to the same bytes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psutil
import pytest
from tests.end_to_end.test_walking_path import Machine
from torture.machine import wait_for


def commands(machine: Machine, attempt_id: str) -> str:
    """The command lines of an attempt's processes, as far as they are there now."""
    found = []
    for process in machine.processes():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLASH_ATTEMPT_ID") == attempt_id:
                found.append(" ".join(process.cmdline()))
    return "\n".join(found)


@pytest.mark.slow
def test_forked_or_afresh_the_adapter_is_the_same(tmp_path: Path) -> None:
    adapters = []
    for preload, program in (("true", "flash.worker.preloaded"), ("false", "flash.worker.supervisor")):
        machine = Machine(tmp_path / preload, FLASH_SERVER_PRELOAD=preload)
        try:
            machine.flash("env", "push", "--name", "echo", "echo")
            run_id = json.loads(machine.flash("train", "echo.toml", "--background", "--json"))["run_id"]
            seen = wait_for(lambda machine=machine, run_id=run_id: commands(machine, f"{run_id}.1"), 180)
            assert program in seen
            machine.flash("status", run_id, "-f")
            copy = tmp_path / f"copy-{preload}"
            machine.flash("export", "--adapter-id", run_id, "--output", copy)
            adapters.append((copy / "adapter_model.safetensors").read_bytes())
        finally:
            machine.flash("server", "stop")
        assert not machine.processes()
    assert adapters[0] == adapters[1]
