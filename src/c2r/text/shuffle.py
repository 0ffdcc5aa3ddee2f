"""Shuffle rows of text before a model reads them. Token ids are small, so this window can be long.

R rows · T positions in a context.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from c2r.text.packing import Rows, pass_of


def shuffled_rows(
    read: Callable[[Any], Iterator[Rows]], tokens: int, *, rows: int, seed: int = 0
) -> Callable[[Any], Iterator[Rows]]:
    """A reader of the same rows, shuffled within windows of `tokens` tokens.

    A document spans many rows, and a window of activations holds few documents. Without this shuffle, a batch covers
    few subjects, and the following batches cover others. A window ends with each pass over the source, so that every
    row is served once before any is served again (not for a mixture, whose parts have no common pass). The order
    depends only on the seed and the window, so a position is where the window begins in the text and how many of its
    rows were served. The next window is read while the current one is served.

    Arguments:
        read: returns rows from a position, or from the beginning (None), like `packed_rows`.
        tokens: minimum number of tokens in a window, which ends with a batch of `read`; 0: no shuffling.
        rows: R, the rows per batch.
        seed: seed of the order.
    """
    return read if tokens == 0 else lambda start: _shuffled(read, tokens, rows, seed, start)


def permutation(size: int, name: str) -> Tensor:
    """A permutation of `size` elements, seeded by a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def _shuffled(read: Callable[[Any], Iterator[Rows]], tokens: int, rows: int, seed: int, start: Any) -> Iterator[Rows]:
    at = start or {"window": 0, "served": 0, "begins": None}
    number, served = at["window"], at["served"]
    windows = itertools.groupby(_numbered(read(at["begins"]), tokens), key=lambda item: item[0])
    window = _of(next(windows, None))
    while batches := list(window):
        ids_RT, real_RT = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "real"))
        begins, order_R = batches[0].position, permutation(len(ids_RT), f"{seed} text {number}")
        coming, batches = _of(next(windows, None)), []
        fault: Exception | None = None
        for first in range(served, len(ids_RT), rows):
            try:
                batches += [] if fault else itertools.islice(coming, 1)
            except Exception as error:  # raised below, once everything read before it has been served
                fault = error
            rows_R = order_R[first : first + rows]
            yield Rows(ids_RT[rows_R], real_RT[rows_R], {"window": number, "served": first, "begins": begins})
        if fault:
            raise fault
        window, number, served = itertools.chain(batches, coming), number + 1, 0


def _numbered(batches: Iterator[Rows], tokens: int) -> Iterator[tuple[int, Rows]]:
    """Batches, each with the number of its window, counted from 0 at the first batch."""
    number = size = 0
    last = None
    for batch in batches:
        now = pass_of(batch.position)
        if size >= tokens or (size and now != last):
            number, size = number + 1, 0
        size, last = size + batch.ids.numel(), now
        yield number, batch


def _of(window: tuple[int, Iterator[tuple[int, Rows]]] | None) -> Iterator[Rows]:
    return iter(()) if window is None else (batch for _, batch in window[1])
