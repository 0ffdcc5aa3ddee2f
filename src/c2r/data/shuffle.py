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

from c2r.data.tokens import Rows


def shuffled_rows(
    read: Callable[[Any], Iterator[Rows]], tokens: int, *, rows: int, seed: int = 0
) -> Callable[[Any], Iterator[Rows]]:
    """A reader of the same rows, in windows of `tokens` tokens of which each is served in an order of its own.

    A document is many rows, and a window of activations holds few documents: without this, a batch is of few subjects
    and what comes next is of others. The order depends on the seed and the window alone, so a position is where the
    window begins in the text and how many of its rows were served. The next window is read while one is served.

    Arguments:
        read: rows from a position on, or from the beginning (None), as `packed_rows` gives them.
        tokens: of a window, at least; it ends with a batch that `read` gives. 0 leaves the rows as they are.
        rows: R, of a batch.
        seed: of the order.
    """
    return read if tokens == 0 else lambda start: _shuffled(read, tokens, rows, seed, start)


def _shuffled(read: Callable[[Any], Iterator[Rows]], tokens: int, rows: int, seed: int, start: Any) -> Iterator[Rows]:
    at = start or {"window": 0, "served": 0, "begins": None}
    served, batches = at["served"], read(at["begins"])
    window = list(_of_size(batches, tokens))
    for number in itertools.count(at["window"]):
        if not window:
            return
        ids_RT, real_RT = (torch.cat([getattr(batch, name) for batch in window]) for name in ("ids", "real"))
        begins, order_R = window[0].position, _order(len(ids_RT), seed, number)
        coming, window = _of_size(batches, tokens), []
        fault: Exception | None = None
        for first in range(served, len(ids_RT), rows):
            try:
                window += [] if fault else itertools.islice(coming, 1)
            except Exception as error:  # is raised when what was read before it is served
                fault = error
            rows_R = order_R[first : first + rows]
            yield Rows(ids_RT[rows_R], real_RT[rows_R], {"window": number, "served": first, "begins": begins})
        if fault:
            raise fault
        window += coming
        served = 0


def _of_size(batches: Iterator[Rows], tokens: int) -> Iterator[Rows]:
    """Batches until they have so many tokens."""
    size = 0
    while size < tokens and (batch := next(batches, None)) is not None:
        size += batch.ids.numel()
        yield batch


def _order(rows: int, seed: int, number: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} text {number}".encode()).digest()
    return torch.randperm(rows, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
