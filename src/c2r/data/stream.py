"""Activations as SAEs want them: filtered, of unit mean square norm, shuffled, in batches; or with known features.

B tokens in a batch · D width of the activations · W tokens in a window · n tokens of a part.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from c2r.config import HookPoint, ModelConfig, StreamConfig
from c2r.data.ahead import Ahead
from c2r.data.reader import CALIBRATION_TOKENS, Measured, Part, Reader, measure, usual
from c2r.data.synthetic import KnownFeatures

_CALIBRATION_SEED, _BLOCK = 2_000_003, 8192
Piece = dict[HookPoint, Tensor]
KNOWN = ModelConfig().point
"""What known features' activations are served under; they have no hook point."""


class _Window:
    """Consecutive tokens of the text, as the reader's parts have them, and the order in which they are served.

    Arguments:
        number: of the window.
        start: the part in which its first token lies (`position`), tokens of that part that belong to earlier windows
            (`skip`), and tokens `dropped` before that part.
        pieces: activations `[n, D]` by hook point, in the order of the text.
        seed: of the order.
        served: how many are not to be served again.
    """

    def __init__(self, number: int, start: dict[str, Any], pieces: list[Piece], seed: int, served: int) -> None:
        self.number, self.start, self.pieces, self.served = number, start, pieces, served
        self.begins = list(itertools.accumulate((len(next(iter(piece.values()))) for piece in pieces), initial=0))
        digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        self.order_W = torch.randperm(self.begins[-1], generator=generator)

    @property
    def left(self) -> int:
        """Tokens to serve yet."""
        return self.begins[-1] - self.served

    def next(self, most: int) -> list[tuple[Piece, Tensor]]:
        """The next tokens, at most so many, those of a batch in the order of the text: rows of pieces."""
        places_n = self.order_W[self.served : self.served + most].sort().values
        self.served += len(places_n)
        cuts = torch.searchsorted(places_n, torch.tensor(self.begins)).tolist()
        return [
            (piece, places_n[first:last] - begin)
            for piece, begin, first, last in zip(self.pieces, self.begins, cuts, cuts[1:], strict=False)
            if last > first
        ]


class ActivationStream:
    """Batches of activations from a reader, live or cached, in an order that can be rebuilt.

    Two numbers a hook point are measured once, on the first tokens (which are not lost): the median norm, beyond whose
    `max_norm_multiple`-fold a token is dropped (for all hook points), and `scale` = √(mean ‖x‖²), by which all are
    divided. What stays is cut into windows of `buffer_tokens`, each permuted by a generator of its own. So the state
    is where a window begins in the text and how much of it was served, and no activations.

    The reader runs ahead in a thread. In memory are one window and what is read ahead.

    Arguments:
        reader: parts in the order of the text.
        config: filter, window and how far the reader may be ahead.
        tokens: activations that will be served in all; the last window ends there. None: no end.
        seed: of the shuffle.
        device: where batches are delivered.
    """

    def __init__(
        self,
        reader: Reader,
        config: StreamConfig,
        *,
        tokens: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.reader, self.config, self.tokens, self.seed, self.device = reader, config, tokens, seed, device
        self._bound = config.ahead_tokens or config.buffer_tokens
        self._measured: Measured | None = None
        self._ahead: Ahead | None = None
        self._begin({"window": 0, "served": 0, "position": None, "skip": 0, "dropped": 0})

    @property
    def scale(self) -> dict[HookPoint, float]:
        """√(mean ‖x‖²) by which activations are divided.

        Raises:
            ValueError: the text holds no real token, or what the reader raises.
        """
        return self._measure().scale

    @property
    def median_norm(self) -> dict[HookPoint, float]:
        """Median norm of the first tokens, before scaling."""
        return self._measure().median_norm

    def batches(self, batch: int, tokens: int) -> Iterator[dict[HookPoint, Tensor]]:
        """`tokens` activations in shuffled batches `[B, D]`; the last may be short. Stops early where the text ends.

        Raises:
            ValueError: what the reader raises, when all whole windows before it are served.
        """
        while tokens > 0:
            picked: list[tuple[Piece, Tensor]] = []
            size = missing = min(batch, tokens)
            while missing and ((self._window is not None and self._window.left) or self._turn()):
                assert self._window is not None
                before = self._window.left
                picked += self._window.next(missing)
                missing -= before - self._window.left
            if missing == size:
                return
            tokens -= size - missing
            yield {point: self._gathered(picked, point) for point in picked[0][0]}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON holds it; to be asked for between batches."""
        window = self._window
        here = self._begun if window is None else {"window": window.number, "served": window.served, **window.start}
        state: dict[str, Any] = dict(here)
        if self._measured is not None:
            for name, values in self._measured._asdict().items():
                state[name] = {point.name: value for point, value in values.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next batch is the one that would have followed it, bit for bit."""
        self.close()
        if "scale" in state:
            points = {HookPoint.of(name): name for name in state["scale"]}
            self._measured = Measured(
                {point: state["median_norm"][name] for point, name in points.items()},
                {point: state["scale"][name] for point, name in points.items()},
            )
        self._begin(state)

    def close(self) -> None:
        """End the reader's thread."""
        if self._ahead is not None:
            self._ahead.close()

    def _begin(self, state: dict[str, Any]) -> None:
        """Stand before the window of a state, of which so many tokens are not to be served again."""
        self._begun = {key: state[key] for key in ("window", "served", "position", "skip", "dropped")}
        self._window: _Window | None = None
        self._ahead: Ahead | None = None
        self._raw: deque[Part] = deque()
        """Parts that were measured and are not yet put into a window."""
        self._part: Part | None = None
        self._used, self._skip = 0, state["skip"]
        self.dropped = self._dropped_before = state["dropped"]

    def _size_of(self, number: int) -> int:
        size = self.config.buffer_tokens
        return size if self.tokens is None else max(0, min(size, self.tokens - number * size))

    def _gathered(self, picked: list[tuple[Piece, Tensor]], point: HookPoint) -> Tensor:
        """Scaled rows `[B, D]` on the device; they cross to another one as they are, and are widened there."""
        pieces = [(piece[point], rows_n) for piece, rows_n in picked]
        here = torch.device(self.device).type == "cpu"
        x_BD = torch.empty(
            sum(len(rows_n) for _, rows_n in pieces), pieces[0][0].shape[1],
            dtype=torch.float32 if here else pieces[0][0].dtype,
        )  # fmt: skip
        first = 0
        for x_ND, rows_n in pieces:  # widened and scaled piece by piece, while it is in the processor's cache
            into_nD = x_BD[first : first + len(rows_n)].copy_(x_ND.index_select(0, rows_n))
            first += len(rows_n)
            if here:
                into_nD.div_(self.scale[point])
        return x_BD if here else x_BD.to(self.device).float().div_(self.scale[point])

    def _turn(self) -> bool:
        """Read the next window and stand at its begin; False where the text has no more."""
        last = self._window
        number = self._begun["window"] if last is None else last.number + 1
        size, pieces, filled, start = self._size_of(number), [], 0, {}
        while filled < size and (part := self._more()) is not None:
            if not pieces:
                start = {"position": part.position, "skip": self._used, "dropped": self._dropped_before}
            piece = {point: x_nD[self._used : self._used + size - filled] for point, x_nD in part.x.items()}
            taken = len(next(iter(piece.values())))
            pieces.append(piece)
            filled, self._used = filled + taken, self._used + taken
        if self._ahead is not None and self._size_of(number + 1) == 0:
            self._ahead.close()  # nothing more will be asked for
        if not pieces:
            return False
        self._window = _Window(number, start, pieces, self.seed, self._begun["served"] if last is None else 0)
        return True

    def _more(self) -> Part | None:
        """A filtered part that is not used up; None where the text has no more."""
        median = self.median_norm
        while self._part is None or self._used >= len(self._part):
            part = self._raw.popleft() if self._raw else self._reading().take()
            if part is None:
                return None
            keep_n = usual(part.norms, median, self.config)
            self._dropped_before, dropped = self.dropped, int((~keep_n).sum())
            self.dropped += dropped
            self._part = part.only(keep_n) if dropped else part
            self._used, self._skip = self._skip, 0
        return self._part

    def _measure(self) -> Measured:
        if self._measured is None:
            wanted = min(CALIBRATION_TOKENS, self._size_of(0))
            while sum(map(len, self._raw)) < wanted and (part := self._reading().take()) is not None:
                self._raw.append(part)
            self._measured = measure(self._raw, wanted, self.config)
        return self._measured

    def _reading(self) -> Ahead:
        if self._ahead is None:
            self._ahead = Ahead(partial(self.reader.read, self._begun["position"]), self._bound)
            weakref.finalize(self, self._ahead.stop)
        return self._ahead


class SyntheticStream:
    """Batches of known features' activations, divided by `scale` = √(mean ‖x‖²), which is measured once.

    The same face as `ActivationStream`. What is served depends on the seed and not on the size of batches.

    Arguments:
        features: what to draw from.
        seed: of what is drawn.
        device: where batches are delivered.
    """

    def __init__(self, features: KnownFeatures, *, seed: int = 0, device: str | torch.device = "cpu") -> None:
        self.features, self.device = features, device
        self._generator = torch.Generator().manual_seed(seed)
        norms_N = features.sample(CALIBRATION_TOKENS, torch.Generator().manual_seed(_CALIBRATION_SEED)).x_BD.norm(dim=1)
        scale = norms_N.square().mean().sqrt().item()
        if not 0 < scale < float("inf"):
            raise ValueError(f"data: the activations have mean square norm {scale}; nothing to scale")
        self.scale, self.median_norm = {KNOWN: scale}, {KNOWN: norms_N.median().item()}
        self._draw(0)

    def batches(self, batch: int, tokens: int) -> Iterator[dict[HookPoint, Tensor]]:
        """`tokens` activations in batches `[B, D]`; the last may be short."""
        while tokens > 0:
            size, pieces = min(batch, tokens), []
            tokens -= size
            while size > 0:
                if self._served == _BLOCK:
                    self._draw(0)
                pieces.append(self._block_ND[self._served : self._served + size])
                self._served += len(pieces[-1])
                size -= len(pieces[-1])
            yield {KNOWN: torch.cat(pieces).to(self.device)}

    def state_dict(self) -> dict[str, Any]:
        """The generator as it was before the block that is being served, and how much of that is."""
        return {"generator": self._before, "served": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next batch is the one that would have followed it, bit for bit."""
        self._generator.set_state(state["generator"])
        self._draw(state["served"])

    def close(self) -> None:
        """Nothing runs that would have to end."""

    def _draw(self, served: int) -> None:
        self._before, self._served = self._generator.get_state(), served
        self._block_ND = self.features.sample(_BLOCK, self._generator).x_BD / self.scale[KNOWN]
