"""Says, before pip runs, which build of torch is about to be installed and how to choose another.

On Linux the default wheel of torch brings CUDA's libraries along, several gigabytes that a machine without
an NVIDIA GPU has no use for.
"""

import importlib.util
import platform
import shutil
import sys


def advice(torch_index: str, *, system: str, has_torch: bool, has_gpu: bool) -> str | None:
    """One line for the person at the terminal, or None when nothing large or unexpected is coming."""
    if has_torch or system != "Linux" or has_gpu or torch_index:
        return None
    return (
        "No NVIDIA GPU found. Unless pip is set up with a CPU build of torch, it now fetches the CUDA build "
        "(several GB). To take the CPU build: make setup TORCH_INDEX=<the CPU index of PyTorch's install page>"
    )


if __name__ == "__main__":
    line = advice(
        sys.argv[1] if len(sys.argv) > 1 else "",
        system=platform.system(),
        has_torch=importlib.util.find_spec("torch") is not None,
        has_gpu=shutil.which("nvidia-smi") is not None,
    )
    if line:
        print(line)
