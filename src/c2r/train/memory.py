"""The C library's allocator, told to keep what is freed: a third of a CPU step was page faults."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


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
