"""Memory: how much is free here, how much was taken, and what the process's heap keeps. PyTorch on a CPU asks malloc for every tensor, and glibc answers large
requests with fresh pages."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from .files import OUT_OF_MEMORY
from .threads import CGROUPS, MEMBERSHIP, folders

SPARE = 128
"""Bytes of a tensor's spare room, where it has any (`with_room`)."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_memory(free: int | None = None) -> bool:
    """Let freed memory stay with the process, to be used again without the kernel's zeroing it first.

    A training step frees and asks for gigabytes; page faults were a tenth of an update (docs/log.md), and a twelfth of one of 135M parameters
    while only 512 MiB stayed. Up to 2 GiB stay, or an eighth of what is `free` where that is less: another program may need it more. Blocks above
    256 MiB are few, and still go back at once. Returns False where the C library has no `mallopt` (musl, macOS): then nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = min(2**31 - 1, max(2**26, (free_ram() if free is None else free) // 8))
    settings = ((M_TRIM_THRESHOLD, kept), (M_MMAP_THRESHOLD, 2**28), (M_TOP_PAD, 2**24))
    return all(mallopt(option, value) == 1 for option, value in settings)


def give_back() -> None:
    """Return freed memory to the machine, also from between what is in use, where the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_ram(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes of main memory that can be had: what the machine has available, or what a control group (a container's limit) leaves."""
    rooms = [room for folder in folders("memory", root, membership) if (room := _room(folder)) is not None]
    return min([int(psutil.virtual_memory().available), *rooms])


def _room(folder: Path) -> int | None:
    """What is left below the limit of one control group, of version 2 or 1; files in its cache can go."""
    for limit_name, used_name, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            if limit == "max" or int(limit) >= 2**60:  # version 1 says "none" as the largest number of pages
                return None
            used, statistics = int((folder / used_name).read_text()), (folder / "memory.stat").read_text()
            counted = dict(line.split() for line in statistics.splitlines())
            return max(0, int(limit) - used + int(counted.get(cache, 0)))
        except (OSError, ValueError):
            continue
    return None


def free_memory(device: torch.device) -> int:
    """Bytes that can be had where a device computes; on a GPU also what PyTorch holds without using it."""
    if device.type != "cuda":
        return free_ram()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def measure_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the kernel lets it: a process may have held more before its run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held since `measure_peak`: of PyTorch's tensors on a GPU, else resident in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def lazy_zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU that take memory, and time, only where they are touched."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)


def with_room(shape: Sequence[int], dtype: torch.dtype, spare: int) -> torch.Tensor:
    """An empty tensor on the CPU whose memory is `spare` times 128 bytes larger.

    PyTorch asks for addresses in steps of 64, and for that glibc (2.36) takes what was freed only where it is 96 bytes larger than what
    is asked for: tensors of one size never take each other's places. What is given room when it will soon be freed leaves places for
    what is kept; 2 for what lives shortest, 1 for what may be kept, and PyTorch's own tensors have none. A training pass takes a tenth less
    memory (docs/log.md).
    """
    size = math.prod(shape)
    return torch.empty(size + spare * SPARE // dtype.itemsize, dtype=dtype)[:size].view(shape)
