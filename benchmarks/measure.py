"""What every benchmark shares: the machine's facts, running one side in its own process, alternating pairs.

Both sides run in turn within one call, so that a machine whose speed drifts treats them alike; what is
quoted is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PEERS_PYTHON = ROOT.parent / ".venv-peers" / "bin" / "python"


def ensure_peers() -> Path:
    """Makes `.venv-peers` from `peers.txt` once; a peer never shares our environment."""
    stamp = PEERS_PYTHON.parent.parent / ".ready"
    wanted = (ROOT / "peers.txt").read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print("Setting up .venv-peers (about a minute)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PEERS_PYTHON.parent.parent)], check=True)
        subprocess.run([str(PEERS_PYTHON), "-m", "pip", "install", "-q", "-r", str(ROOT / "peers.txt")], check=True)
        stamp.write_text(wanted)
    return PEERS_PYTHON


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 1),  # over the last minute; above the sides' own threads, others worked too
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "flash-lora")},
        "peer_versions": dict(
            line.split("==") for line in (ROOT / "peers.txt").read_text().splitlines() if "==" in line
        ),
    }


def run_side(python: str | Path, script: str, job: dict[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
    """One run of `sides/<script>` in a process of its own; its last line of output is its result."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FLASH_", "PYTHON"))}
    env |= {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(python), str(ROOT / "sides" / script)], input=json.dumps(job), capture_output=True, text=True,
        env=env, timeout=timeout_s,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {script} failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@dataclass(frozen=True)
class Spread:
    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.minimum:.3g} to {self.maximum:.3g})"


def write_result(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **result}
    path.write_text(json.dumps(document, indent=2, default=vars) + "\n")
    return path
