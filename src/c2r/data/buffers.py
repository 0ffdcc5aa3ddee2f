"""Memory that is used again once nothing looks at it any more."""

from __future__ import annotations

import weakref

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Buffers:
    """Hands out blocks of memory and takes them back by itself when the last array or tensor over them is gone.

    Where a file is read from the system's memory, the pages of fresh memory cost several times the reading.

    Arguments:
        capacity: bytes of a block.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: list[Bytes] = []

    def take(self, size: int) -> Bytes:
        """`size` bytes, at most `capacity`, with anything in them."""
        block = self._free.pop() if self._free else np.empty(self.capacity, np.uint8)
        lent = block[:size]
        weakref.finalize(lent, self._free.append, block).atexit = False
        return lent
