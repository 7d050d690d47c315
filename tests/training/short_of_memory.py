"""SFT in a process whose address space is limited as training begins, then without the limit: what happened, as JSON.

`short_of_memory.py FOLDER`
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training.conftest import save_tiny, sft_spec, write_package
from tests.training.test_out_of_memory import memory_warnings, numbers

from flash.environments.loading import LocalEnvironment
from flash.inference.loading import load_base
from flash.records import Phase
from flash.training.reporter import RecordingReporter
from flash.training.sft import train

ROOM = 40 << 20  # bytes beside what is there when the limit falls


def limit(room: int | None) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.RLIM_INFINITY if room is None else size + room
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


class Limiting(RecordingReporter):
    def __init__(self, room: int | None) -> None:
        super().__init__()
        self._room = room

    def phase(self, phase: Phase, *, total_steps: int | None = None) -> None:
        super().phase(phase, total_steps=total_steps)
        if phase is Phase.TRAINING:
            limit(self._room)


folder = Path(sys.argv[1])
(folder / "model").mkdir()
base = load_base(save_tiny(folder / "model"), name="flash/nano", device="cpu")
lines = [json.dumps({"input": f"{i} " + "x" * 400, "output": str(i)}) for i in range(96)]
package = write_package(folder / "package", lines=lines)
spec = sft_spec(batch_size=32, max_length=500)


def run(name: str, room: int | None) -> RecordingReporter:
    work_dir = folder / name
    work_dir.mkdir()
    environment, reporter = LocalEnvironment(package, {}, work_dir), Limiting(room)
    try:
        train(spec, base, environment, reporter, work_dir=work_dir)
    finally:
        limit(None)
        environment.close()
    return reporter


small, whole = run("small", ROOM), run("whole", None)
norms = [each.of("metrics")[0]["values"]["grad_norm"] for each in (small, whole)]
gap = abs(norms[0] / norms[1] - 1)
print(json.dumps({"warnings": memory_warnings(small), "steps": numbers(small), "gap": gap}))
