"""The process's heap. PyTorch on a CPU asks malloc for every tensor, and glibc answers large requests with fresh pages."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_memory() -> bool:
    """Let freed memory stay with the process, to be used again without the kernel's zeroing it first.

    A training step frees and asks for gigabytes; page faults were a tenth of an update (docs/log.md), and a twelfth of one of 135M parameters
    while only 512 MiB stayed. Blocks above 256 MiB are few, and still go back at once. Returns False where the C library has no `mallopt` (musl,
    macOS): then nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**28), (M_TOP_PAD, 2**24))
    return all(mallopt(option, value) == 1 for option, value in settings)


def lazy_zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU that take memory, and time, only where they are touched."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)
