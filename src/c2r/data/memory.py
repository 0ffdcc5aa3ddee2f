"""Whether something fits into memory, asked before it is loaded where its size is known."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


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
