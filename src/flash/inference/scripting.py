"""Chains of small tensor operations that run through without the interpreter.

Lanes and HTTP loops are threads of one interpreter, and between any two operations a thread has to get it back from
the others. A small model's operations are so short that this waiting is as long as the work. TorchScript runs a whole
function in one go: the same kernels in the same order, so the same numbers to the last bit. PyTorch calls it
deprecated; where it is gone, or refuses a function, the function runs as the Python that it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., object])


def scripted(function: F) -> F:
    """The function for TorchScript, or itself. It may use only what TorchScript knows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cast(F, torch.jit.script(function))
    except Exception:  # whatever a PyTorch without it raises
        return function
