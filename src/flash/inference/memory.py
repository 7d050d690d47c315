"""Which errors mean that a device's memory ran out, and giving back what a failed piece of work held.

torch has a class for GPUs; its CPU allocator, the GPU's libraries and the system each say it in words of their own.
"""

from __future__ import annotations

import errno
import gc

import torch

_WORDS = (
    "can't allocate memory",  # torch's allocator on the CPU
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA's runtime ("CUDA error: out of memory") and Apple's
    "alloc_failed",  # cuBLAS and cuDNN: no room for a workspace
    "cannot allocate memory",  # ENOMEM, where a file of weights can't be mapped
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, in the processor or in an accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    known = isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith("safetensors")
    return known and any(word in str(error).lower() for word in _WORDS)


def first_line(error: BaseException) -> str:
    """The error's own words, as far as a person needs them."""
    return next(iter(str(error).splitlines()), "")[:500] or "memory ran out"


def release() -> None:
    """Gives memory back that only a handled error still held: its frames hold tensors, often in cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other pieces than those that did not suffice
