"""Activations as SAEs want them: filtered, of unit mean square norm, shuffled, in batches; or with known features.

B tokens in a batch · D width of the activations · W tokens in a window · n tokens of a part.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from c2r.config import HookPoint, ModelConfig, StreamConfig
from c2r.data.ahead import Ahead
from c2r.data.reader import CALIBRATION_TOKENS, Measured, Part, Reader, measure, usual
from c2r.data.synthetic import KnownFeatures

_CALIBRATION_SEED, _BLOCK = 2_000_003, 8192
KNOWN = ModelConfig().point
"""What known features' activations are served under; they have no hook point."""


@dataclass
class _Window:
    """A window that is filled in the order of the text, then served in the order of its permutation."""

    number: int
    size: int
    slots: Tensor
    """Where in the memory its tokens lie, in the order of the text or, once it is served, of serving."""
    start: dict[str, Any] | None = None
    """The part in which its first token lies (`position`), tokens of that part that belong to earlier windows (`skip`),
    and tokens `dropped` before that part."""
    filled: int = 0
    served: int = 0


class ActivationStream:
    """Batches of activations from a reader, live or cached, in an order that can be rebuilt.

    Two numbers a hook point are measured once, on the first tokens (which are not lost): the median norm, beyond whose
    `max_norm_multiple`-fold a token is dropped (for all hook points), and `scale` = √(mean ‖x‖²), by which all are
    divided. What stays is cut into windows of `buffer_tokens`, each permuted by a generator of its own. So the state
    is where a window begins in the text and how much of it was served, and no activations.

    The reader runs ahead in a thread. One window is in memory: the next moves into the places of what was served.

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
        self._bound = config.ahead_tokens or max(1, config.buffer_tokens // 4)
        self._measured: Measured | None = None
        self._ahead: Ahead | None = None
        self._memory: dict[HookPoint, Tensor] = {}
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
            pieces: list[dict[HookPoint, Tensor]] = []
            size = missing = min(batch, tokens)
            while missing and (self._window.served < self._window.filled or self._turn()):
                pieces.append(self._serve(missing))
                missing -= len(next(iter(pieces[-1].values())))
            if missing == size:
                return
            tokens -= size - missing
            whole = {point: torch.cat([p[point] for p in pieces]) for point in pieces[0]} if pieces[1:] else pieces[0]
            yield {point: x_BD.to(self.device).float().div_(self.scale[point]) for point, x_BD in whole.items()}
            self._fill(wait=False)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON holds it; to be asked for between batches."""
        window = self._window
        state: dict[str, Any] = {"window": window.number, "served": window.served, **(window.start or {})}
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
        start = {key: state[key] for key in ("position", "skip", "dropped")}
        number, places = state["window"], torch.arange(self.config.buffer_tokens)
        self._window = _Window(number, 0, places[:0], start, served=state["served"])
        self._next = _Window(number, self._size_of(number), places)
        self._ahead, self._position = None, state["position"]
        self._raw: deque[Part] = deque()
        """Parts that were measured and are not yet put into a window."""
        self._part: Part | None = None
        self._used, self._skip = 0, state["skip"]
        self.dropped = self._dropped_before = state["dropped"]

    def _size_of(self, number: int) -> int:
        size = self.config.buffer_tokens
        return size if self.tokens is None else max(0, min(size, self.tokens - number * size))

    def _serve(self, most: int) -> dict[HookPoint, Tensor]:
        window = self._window
        slots = window.slots[window.served : window.served + most]
        window.served += len(slots)
        return {point: memory_WD.index_select(0, slots) for point, memory_WD in self._memory.items()}

    def _turn(self) -> bool:
        """Fill the next window to its end and begin to serve it; False where the text has no more."""
        self._fill(wait=True)
        window, before = self._next, self._window
        if window.filled == 0:
            return False
        order = torch.randperm(window.filled, generator=torch.Generator().manual_seed(self._seed_of(window.number)))
        window.slots = window.slots[order]
        window.served = before.served if before.number == window.number else 0
        self._window = window
        # Token i of the next window takes the place of the i-th served of this one.
        self._next = _Window(window.number + 1, self._size_of(window.number + 1), window.slots)
        return True

    def _seed_of(self, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:4], "big")

    def _fill(self, *, wait: bool) -> None:
        """Move what the reader has into the next window: as much as has place, or, without `wait`, as is there."""
        serving, window = self._window, self._next
        room = window.size if serving.served >= serving.filled else min(serving.served, window.size)
        while window.filled < room and (part := self._more(wait)) is not None:
            if window.start is None:
                window.start = {"position": part.position, "skip": self._used, "dropped": self._dropped_before}
            taken = min(room - window.filled, len(part) - self._used)
            slots_n = window.slots[window.filled : window.filled + taken].numpy()
            for point, x_nD in part.x.items():
                if point not in self._memory:
                    self._memory[point] = torch.empty(self._size_of(0), x_nD.shape[1], dtype=x_nD.dtype)
                _as_bytes(self._memory[point])[slots_n] = _as_bytes(x_nD[self._used : self._used + taken])
            window.filled += taken
            self._used += taken
        if self._ahead is not None and window.filled == window.size and self._size_of(window.number + 1) == 0:
            self._ahead.close()  # nothing more will be asked for

    def _more(self, wait: bool) -> Part | None:
        """A filtered part that is not used up; None where there is none (yet)."""
        median = self.median_norm
        while self._part is None or self._used >= len(self._part):
            part = self._raw.popleft() if self._raw else self._reading().take(wait=wait)
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
            while sum(map(len, self._raw)) < wanted and (part := self._reading().take(wait=True)) is not None:
                self._raw.append(part)
            self._measured = measure(self._raw, wanted, self.config)
        return self._measured

    def _reading(self) -> Ahead:
        if self._ahead is None:
            self._ahead = Ahead(partial(self.reader.read, self._position), self._bound)
            weakref.finalize(self, self._ahead.stop)
        return self._ahead


def _as_bytes(x_ND: Tensor) -> Any:
    """Rows as NumPy's opaque values `[N]`: moved to scattered places at once, twice as fast as torch's by element."""
    bytes_Nb = x_ND.contiguous().view(torch.uint8).numpy()
    return bytes_Nb.view(f"V{bytes_Nb.shape[1]}")[:, 0]


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
