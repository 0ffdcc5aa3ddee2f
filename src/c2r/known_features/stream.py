"""Batches of activations made of known features.

B tokens in a batch · D width of the activations · N tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from c2r.activations.reader import CALIBRATION_TOKENS
from c2r.config.hooks import HookPoint
from c2r.config.run import ModelConfig
from c2r.known_features.generator import KnownFeatures

_CALIBRATION_SEED, _BLOCK = 2_000_003, 8192

KNOWN = ModelConfig().point
"""Key under which batches of synthetic activations are returned, since they have no hook point."""


class SyntheticStream:
    """Batches of known features' activations, divided by `scale` = √(mean ‖x‖²), which is measured once.

    It has the interface of `ActivationStream`; no token is dropped. The sequence of activations depends on the seed but
    not on the batch size.

    Arguments:
        features: the features from which activations are sampled.
        seed: seed of the samples.
        device: device of the returned batches.
    """

    def __init__(self, features: KnownFeatures, *, seed: int = 0, device: str | torch.device = "cpu") -> None:
        self.features, self.device = features, device
        self._generator = torch.Generator().manual_seed(seed)
        norms_N = features.sample(CALIBRATION_TOKENS, torch.Generator().manual_seed(_CALIBRATION_SEED)).x_BD.norm(dim=1)
        scale = norms_N.square().mean().sqrt().item()
        if not 0 < scale < float("inf"):
            raise ValueError(f"data: the activations have root mean square norm {scale}; expected a finite number > 0")
        self.scale, self.median_norm = {KNOWN: scale}, {KNOWN: norms_N.median().item()}
        self.look: Mapping[HookPoint, dict[str, Any]] = {}
        self._draw(0)

    def batches(self, batch: int, tokens: int) -> Iterator[dict[HookPoint, Tensor]]:
        """`tokens` activations in batches `[B, D]`; the last one may be smaller."""
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
        """State of the generator before the current block, and how many tokens of the block were returned."""
        return {"generator": self._before, "served": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state: the next batch is bit-identical to the one that would have followed it."""
        self._generator.set_state(state["generator"])
        self._draw(state["served"])

    def close(self) -> None:
        """Do nothing, since there are no background tasks to stop."""

    def _draw(self, served: int) -> None:
        self._before, self._served = self._generator.get_state(), served
        self._block_ND = self.features.sample(_BLOCK, self._generator).x_BD / self.scale[KNOWN]
