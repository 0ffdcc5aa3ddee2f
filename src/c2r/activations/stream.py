"""Activations prepared for SAE training: filtered, scaled to mean square norm 1, shuffled and batched.

B tokens in a batch · D width of the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from c2r.activations.look import Decode, none_known
from c2r.activations.prefetch import Ahead
from c2r.activations.reader import ActivationReader, Measured
from c2r.activations.windows import Prepared, Windows
from c2r.config.hooks import HookPoint
from c2r.config.run import StreamConfig

_ROWS = 256


class ActivationStream:
    """Batches of activations from a live or cached reader, in a reproducible order.

    Two numbers per hook point are measured once on the first tokens (which are served too): the median norm, since
    tokens above `max_norm_multiple` times the median are dropped (at all hook points), and `scale` = √(mean ‖x‖²), by
    which activations are divided. The tokens kept are cut into windows of `window_tokens`, each shuffled with its own
    seed. The state is therefore small: where a window begins in the text and how much of it was served.

    The reader runs ahead in one thread, and another gathers the next batch. Memory holds one window, the tokens read
    ahead and two batches.

    Arguments:
        reader: parts in the order of the text.
        config: filter, window size and how far the reader may run ahead.
        tokens: total number of activations to serve; the last window ends there. None: endless.
        seed: seed of the shuffle.
        device: device on which batches are delivered.
        decode: maps a token id to its text, for messages about the activations.
    """

    def __init__(
        self,
        reader: ActivationReader,
        config: StreamConfig,
        *,
        tokens: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        decode: Decode = none_known,
    ) -> None:
        self.device = device
        pinned = torch.device(device).type == "cuda"
        self._windows_from = partial(Windows, reader, config, tokens, seed, pinned=pinned, decode=decode)
        self._preparing: Ahead[Prepared] | None = None
        self._ending: list[Ahead[Any]] = []
        self._stand({"window": 0, "served": 0, "position": None, "skip": 0, "dropped": 0}, None)

    @property
    def scale(self) -> dict[HookPoint, float]:
        """√(mean ‖x‖²) by which activations are divided.

        Raises:
            ValueError: the text holds no real token, or an error of the reader.
        """
        return self._windows.measure().scale

    @property
    def median_norm(self) -> dict[HookPoint, float]:
        """Median norm of the first tokens, before scaling."""
        return self._windows.measure().median_norm

    @property
    def look(self) -> Mapping[HookPoint, dict[str, Any]]:
        """Statistics of the first tokens at each hook point; see `c2r.activations.look.Look`."""
        return self._windows.measure().look

    @property
    def dropped(self) -> int:
        """Number of tokens dropped as outliers so far."""
        return self._windows.dropped

    def batches(self, batch: int, tokens: int) -> Iterator[dict[HookPoint, Tensor]]:
        """`tokens` activations in shuffled batches `[B, D]`; the last may be smaller. Ends early if the text does.

        Only one call is active at a time: a new call ends an unfinished one and continues after its last batch.

        Raises:
            ValueError: an error of the reader, after all complete windows before it were served.
            RuntimeError: the stream was closed, or `batches` was called again.
        """
        if self._preparing is not None:
            self.close()
        self._join()
        ahead = Ahead(partial(self._windows.batches, batch, tokens), batch, "c2r batches", start=False)
        try:
            self._preparing = ahead  # stored before its thread starts, so that it can be stopped after a signal
            ahead.start()
            while (prepared := ahead.take()) is not None:
                x = {point: self._scaled(x_BD, point) for point, x_BD in prepared.rows.items()}
                self._stands = prepared.state  # only once there is a batch to serve
                yield x
                del x  # frees its memory for the next batch
            if self._preparing is not ahead:
                raise RuntimeError("the stream was closed, or batches() was called again; call batches() to continue")
            self._preparing = None
        except BaseException:  # the consumer stopped; discard prepared batches
            if self._preparing is ahead:
                self._stop()
                self._stand(self._stands, self._windows.measured)
            raise

    def state_dict(self) -> dict[str, Any]:
        """The stream's state, JSON-serializable; call it between batches."""
        state = dict(self._stands)
        if self._windows.measured is not None:
            for name, values in self._windows.measured._asdict().items():
                state[name] = {point.name: value for point, value in values.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state: the next batch is bit-identical to the one that would have followed."""
        self.close()
        measured = None
        if "scale" in state:
            points = {HookPoint.of(name): name for name in state["scale"]}
            measured = Measured(
                {point: state["median_norm"][name] for point, name in points.items()},
                {point: state["scale"][name] for point, name in points.items()},
                {point: state["look"][name] for point, name in points.items() if name in state.get("look", {})},
            )
        self._stand(state, measured)

    def close(self) -> None:
        """End the threads. The stream can still be used: the next batch is the one after the last served."""
        self._stop()
        self._join()
        self._stand(self._stands, self._windows.measured)

    def _stop(self) -> None:
        """Tell the threads to end, without waiting for them."""
        if self._preparing is not None:
            self._preparing.stop()
            self._ending.append(self._preparing)
        reading = self._windows.stop()
        if reading is not None:
            self._ending.append(reading)
        self._preparing = None

    def _join(self) -> None:
        """Wait for threads that are ending, since only one thread may use the reader."""
        while self._ending:
            self._ending.pop().close()

    def _stand(self, state: dict[str, Any], measured: Measured | None) -> None:
        self._stands = {key: state[key] for key in ("window", "served", "position", "skip", "dropped")}
        self._windows: Windows = self._windows_from(self._stands, measured)

    def _scaled(self, x_BD: Tensor, point: HookPoint) -> Tensor:
        """Scaled fp32 rows on the device; they are transferred in their own precision and converted there."""
        factor = 1 / self.scale[point]
        if torch.device(self.device).type != "cpu":
            return x_BD.to(self.device, non_blocking=x_BD.is_pinned()).float().mul_(factor)
        wide_BD = x_BD if x_BD.dtype == torch.float32 else torch.empty(x_BD.shape, dtype=torch.float32)
        for narrow, wide in zip(x_BD.split(_ROWS), wide_BD.split(_ROWS), strict=True):  # still in the CPU cache
            (wide if wide_BD is x_BD else wide.copy_(narrow)).mul_(factor)
        return wide_BD
