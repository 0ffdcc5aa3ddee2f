"""Cut the text's activations into windows, each served in a shuffled order.

B tokens in a batch · D width of the activations · W tokens in a window · n tokens of a piece.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from c2r.activations.look import Decode, none_known
from c2r.activations.prefetch import Ahead
from c2r.activations.reader import CALIBRATION_TOKENS, ActivationReader, Measured, Part, check_kept, measure, usual
from c2r.config.hooks import HookPoint
from c2r.config.run import StreamConfig
from c2r.text.shuffle import permutation

Piece = dict[HookPoint, Tensor]
"""Activations `[n, D]` of consecutive tokens at each hook point."""


@dataclass(frozen=True)
class Prepared:
    """A batch with its rows gathered."""

    rows: dict[HookPoint, Tensor]
    """Activations `[B, D]` at each hook point, on the CPU, in the precision of the reader's parts."""
    state: dict[str, Any]
    """State of the stream after this batch."""

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


class Window:
    """Consecutive tokens of the text, in pieces from the reader's parts, and the order in which they are served.

    Arguments:
        number: index of the window.
        start: `position` of the part with its first token, how many of that part's tokens belong to earlier windows
            (`skip`), and how many tokens were `dropped` before that part.
        pieces: activations `[n, D]` by hook point, in the order of the text.
        seed: seed of the order.
        served: number of tokens already served.
    """

    def __init__(self, number: int, start: dict[str, Any], pieces: list[Piece], seed: int, served: int) -> None:
        self.number, self.start, self.pieces, self.served = number, start, pieces, served
        self.begins = list(itertools.accumulate((len(next(iter(piece.values()))) for piece in pieces), initial=0))
        self.order_W = permutation(self.begins[-1], f"{seed} {number}")

    @property
    def left(self) -> int:
        """Number of tokens not yet served."""
        return self.begins[-1] - self.served

    def next(self, most: int) -> list[tuple[Piece, Tensor]]:
        """The next tokens, at most `most`, as row indices into pieces; sorted in the order of the text."""
        places_n = self.order_W[self.served : self.served + most].sort().values
        self.served += len(places_n)
        cuts = torch.searchsorted(places_n, torch.tensor(self.begins)).tolist()
        return [
            (piece, places_n[first:last] - begin)
            for piece, begin, first, last in zip(self.pieces, self.begins, cuts, cuts[1:], strict=False)
            if last > first
        ]


class Windows:
    """Filtered windows of a reader's parts, starting at a place in the text; the implementation of `ActivationStream`.

    Only one thread at a time may use it.

    Arguments:
        reader, config, tokens, seed: see `ActivationStream`.
        begun: where to start: index of the `window`, number of its tokens already `served`, and `Window.start`.
        measured: statistics of the activations; None: measure them.
        pinned: whether batches are in pinned memory, for faster transfer to a GPU.
        decode: maps a token id to its text, for messages about the activations.
    """

    def __init__(
        self,
        reader: ActivationReader,
        config: StreamConfig,
        tokens: int | None,
        seed: int,
        begun: dict[str, Any],
        measured: Measured | None,
        *,
        pinned: bool = False,
        decode: Decode = none_known,
    ) -> None:
        self.decode = decode
        self.reader, self.config, self.tokens, self.seed = reader, config, tokens, seed
        self.begun, self.measured, self.pinned = begun, measured, pinned
        self.reading: Ahead[Part] | None = None
        self._stopped = False
        self.dropped = self._dropped_before = begun["dropped"]
        self._window: Window | None = None
        self._number, self._served = begun["window"], begun["served"]
        """Index of the next window, and number of its tokens already served."""
        self._raw: deque[Part] = deque()
        """Parts that were measured but are not yet in a window."""
        self._part: Part | None = None
        self._used, self._skip = 0, begun["skip"]
        self._seen = self._kept = 0
        """Number of tokens read for the window being filled, and of those kept."""

    def stop(self) -> Ahead[Part] | None:
        """Stop the reader's thread, even if it has not started yet; return its object if there is one."""
        self._stopped = True
        if self.reading is not None:
            self.reading.stop()
        return self.reading

    def measure(self) -> Measured:
        """Median norms, scales and looks, measured on the first tokens unless already known."""
        if self.measured is None:
            wanted = min(CALIBRATION_TOKENS, self._size_of(0))
            while sum(map(len, self._raw)) < wanted and (part := self._ahead().take()) is not None:
                self._raw.append(part)
            self.measured = measure(self._raw, wanted, self.config, self.decode)
        return self.measured

    def batches(self, batch: int, tokens: int) -> Iterator[Prepared]:
        """`tokens` tokens in batches, the last of which may be smaller; ends early if the text does."""
        while tokens > 0:
            picked: list[tuple[Piece, Tensor]] = []
            size = missing = min(batch, tokens)
            state: dict[str, Any] = {}
            while missing and ((self._window is not None and self._window.left) or self._turn()):
                assert self._window is not None
                before = self._window.left
                picked += self._window.next(missing)
                missing -= before - self._window.left
                state = {"window": self._window.number, "served": self._window.served, **self._window.start}
            if missing == size:
                return
            tokens -= size - missing
            yield Prepared({point: _gathered(picked, point, pinned=self.pinned) for point in picked[0][0]}, state)

    def _size_of(self, number: int) -> int:
        size = self.config.window_tokens
        return size if self.tokens is None else max(0, min(size, self.tokens - number * size))

    def _turn(self) -> bool:
        """Read the next window; False if the text has ended."""
        self._window = None  # free it before reading the next: memory holds one window at a time
        self._seen = self._kept = 0
        number, served = self._number, self._served
        size, pieces, filled, start = self._size_of(number), [], 0, {}
        while filled < size and (part := self._more()) is not None:
            if not pieces:
                start = {"position": part.position, "skip": self._used, "dropped": self._dropped_before}
            piece = {point: x_nD[self._used : self._used + size - filled] for point, x_nD in part.x.items()}
            taken = len(next(iter(piece.values())))
            pieces.append(piece)
            filled, self._used = filled + taken, self._used + taken
        if self.reading is not None and self._size_of(number + 1) == 0:
            self.reading.stop()  # nothing more is needed
        if not pieces:
            return False
        self._number, self._served = number + 1, 0
        self._window = Window(number, start, pieces, self.seed, served)
        return True

    def _more(self) -> Part | None:
        """A filtered part with unused tokens; None if the text has ended."""
        median = self.measure().median_norm
        while self._part is None or self._used >= len(self._part):
            part = self._raw.popleft() if self._raw else self._ahead().take()
            if part is None:
                return None
            keep_n = usual(part.norms, median, self.config)
            self._dropped_before, dropped = self.dropped, int((~keep_n).sum())
            self._seen += len(part)
            self._kept += len(part) - dropped
            check_kept(self._seen, self._kept, self.config)
            self.dropped += dropped
            self._part = part.only(keep_n) if dropped else part
            self._used, self._skip = self._skip, 0
        return self._part

    def _ahead(self) -> Ahead[Part]:
        if self.reading is None:
            bound = self.config.prefetch_tokens or self.config.window_tokens
            reading = Ahead(partial(self.reader.read, self.begun["position"]), bound, start=False)
            self.reading = reading  # stored before its thread starts, so that `stop` finds it
            weakref.finalize(self, reading.stop)
            if self._stopped:  # `stop` was called before the reader existed
                reading.stop()
            reading.start()
        return self.reading


def _gathered(picked: list[tuple[Piece, Tensor]], point: HookPoint, *, pinned: bool) -> Tensor:
    """The picked rows at one hook point, `[B, D]`, in the precision of the pieces.

    NumPy copies them in a single thread and without the GIL, so training is not slowed down.
    """
    pieces = [(piece[point], rows_n) for piece, rows_n in picked]
    shape = sum(len(rows_n) for _, rows_n in pieces), pieces[0][0].shape[1]
    x_BD = torch.empty(shape, dtype=pieces[0][0].dtype, pin_memory=pinned)
    into, first = x_BD.view(torch.uint8).numpy(), 0
    for x_nD, rows_n in pieces:
        of_piece = into[first : first + len(rows_n)]
        np.take(x_nD.contiguous().view(torch.uint8).numpy(), rows_n.numpy(), axis=0, out=of_piece, mode="clip")
        first += len(rows_n)
    return x_BD
