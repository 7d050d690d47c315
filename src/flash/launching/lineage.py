"""Who is whose parent: processes that end with the one above them, and that find what they left behind.

Owns the kernel's side of it. Outside Linux these do nothing, or little.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def adopt_orphans() -> None:
    """Descendants whose parents die become this process's children, so that it can find them (Linux)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """Runs in the child, before its program: it is killed when the thread that started it ends (Linux)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was already too late
            os._exit(1)


def ancestors(*, up_to: str) -> list[psutil.Process]:
    """This process's parent, its parent and so on, to the first of that name; empty if there is none."""
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        found.append(process)
        if process.name() == up_to:
            return found
    return []


def alive(process: psutil.Process) -> bool:
    """A zombie is not, nor is a later process of the same pid."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
