"""Checks for free memory before large allocations, and settings of the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from functools import cache
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


class RoomError(ValueError):
    """Not enough memory."""


def available_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes; on a CPU, of the machine or the container. None if unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reusable by PyTorch
        return torch.cuda.mem_get_info(device)[0] + kept
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" (no limit) is not a number
        limit, used = (int((_CGROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
        free.append(limit - used + cached)  # the page cache is freed on demand
    return min(free, default=None)


def check_fits(what: str, size: int, device: torch.device, advice: str) -> None:
    """Refuse an allocation that does not fit into a device's free memory.

    Arguments:
        what: what needs the memory, for the message.
        size: bytes needed.
        advice: what the user can do.

    Raises:
        RoomError: not enough memory; says what is needed, what is free, and the advice.
    """
    room = available_memory(device)
    if room is not None and size > room:
        raise RoomError(f"{what} need {in_gigabytes(size)}, but {device} has {in_gigabytes(room)} free; {advice}")


def in_gigabytes(size: float) -> str:
    """Format a number of bytes in gigabytes (10⁹ bytes)."""
    return f"{size / 1e9:.3g} GB"


def keep_freed_memory() -> bool:
    """Make glibc reuse large freed blocks instead of returning them to the system; return whether this succeeded.

    Every step frees and allocates tensors of F×D and B×F, for which glibc would map fresh zeroed pages each time. In
    exchange, the process keeps its peak memory. New threads share one heap, since with one heap per thread, memory
    freed by one thread cannot be reused by others. Linux with glibc only. The settings affect the whole process, so
    the trainer calls this, not an import.
    """
    if not _glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)))


def give_freed_memory_back() -> None:
    """Return unused memory to the system. To be called occasionally, since heap fragmentation grows over a long run.

    Takes some hundredths of a second, and causes a few more page faults in the next step.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


@cache
def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
