"""Rows of text shuffled before a model reads them: token ids are small, so that this window can be long.

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
    """A reader of the same rows, in windows of `tokens` tokens of which each is served in an order of its own.

    A document is many rows, and a window of activations holds few documents: without this, a batch is of few subjects
    and what comes next is of others. A window ends where a pass over the source does (a mixture's parts have no common
    one), so that every row comes once before any comes again. The order depends on the seed and the window alone, so a
    position is where the window begins in the text and how many of its rows were served. The next window is read while
    one is served.

    Arguments:
        read: rows from a position on, or from the beginning (None), as `packed_rows` gives them.
        tokens: of a window, at least; it ends with a batch that `read` gives. 0 leaves the rows as they are.
        rows: R, of a batch.
        seed: of the order.
    """
    return read if tokens == 0 else lambda start: _shuffled(read, tokens, rows, seed, start)


def permutation(size: int, name: str) -> Tensor:
    """The order of `size` things that a name decides."""
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
            except Exception as error:  # is raised when what was read before it is served
                fault = error
            rows_R = order_R[first : first + rows]
            yield Rows(ids_RT[rows_R], real_RT[rows_R], {"window": number, "served": first, "begins": begins})
        if fault:
            raise fault
        window, number, served = itertools.chain(batches, coming), number + 1, 0


def _numbered(batches: Iterator[Rows], tokens: int) -> Iterator[tuple[int, Rows]]:
    """Batches, each with the number of the window it belongs to, counted from here."""
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
