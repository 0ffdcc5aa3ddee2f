"""Memory: what is free, asked before something of known size is loaded; and the C library's allocator."""

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
    """More than there is room for."""


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device: of the machine's or the container's memory on a CPU; None if unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for what comes
        return torch.cuda.mem_get_info(device)[0] + kept
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int((_CGROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
        free.append(limit - used + cached)  # what is kept of files goes when memory is asked for
    return min(free, default=None)


def check_fits(what: str, size: int, device: torch.device, advice: str) -> None:
    """Refuse what a device has no room for.

    Raises:
        RoomError: what needs how much, what there is, and the advice.
    """
    room = available_memory(device)
    if room is not None and size > room:
        raise RoomError(f"{what} need {in_gigabytes(size)}, and {device} has {in_gigabytes(room)} free; {advice}")


def in_gigabytes(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 1e9:.3g} GB"


def keep_freed_memory() -> bool:
    """Have glibc reuse large freed blocks in place of returning them to the system; True if it agreed.

    A step frees and allocates tensors of F×D and B×F; each time, glibc maps fresh zeroed pages for them. The price is
    that the process keeps its peak. Threads that start later share one heap: with a heap each, what one frees in pieces
    is of no use to the others, and memory wanders. Linux with glibc only, and for the whole process, so it is the
    trainer that asks for it and no import does.
    """
    if not _glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)))


def give_freed_memory_back() -> None:
    """Return what is kept and not in use to the system, now and then: else the heap's holes add up over a long run.

    It takes some hundredths of a second, and the next step a few page faults more.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


@cache
def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
