"""Activations as SAEs want them: filtered, of unit mean square norm, shuffled, in batches; or with known features.

B tokens in a batch · D width of the activations · N tokens in the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from c2r.config import StreamConfig
from c2r.data.harvest import LanguageModel
from c2r.data.synthetic import KnownFeatures
from c2r.data.tokens import Rows

CALIBRATION_TOKENS = 65_536
_CALIBRATION_SEED, _BLOCK = 2_000_003, 8192


class ActivationStream:
    """Batches of a language model's activations over packed rows.

    Two numbers are measured once, on the first tokens (which are not lost): the median norm, beyond whose
    `max_norm_multiple`-fold a token is dropped, and `scale` = √(mean ‖x‖²), by which all are divided. They are
    served from a buffer of `buffer_tokens` that is refilled when half empty.

    Arguments:
        lm: the model with its hook point.
        rows: packed rows, as `packed_rows` yields them.
        config: filter and buffer.
        seed: of the shuffle.
        device: where batches are delivered.

    Raises:
        ValueError: the rows hold no real token, or the activations are not finite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Iterator[Rows],
        config: StreamConfig,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.device = config, device
        self.generator = torch.Generator().manual_seed(seed)
        self.dropped = 0
        self._raw = (_real_activations(lm, part) for part in rows)
        first: list[Tensor] = []
        while sum(map(len, first)) < min(CALIBRATION_TOKENS, config.buffer_tokens):
            part = next(self._raw, None)
            if part is None:
                break
            first.append(part)
        if sum(map(len, first)) == 0:
            raise ValueError("data: the text holds no token besides BOS, EOS and padding")
        sample_ND = torch.cat(first)
        norms_N = sample_ND.norm(dim=1)
        self.median_norm = norms_N.median().item()
        self.scale = 1.0
        kept_ND = self._keep(sample_ND)
        self.scale = kept_ND.square().sum(1).mean().sqrt().item()
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"model: activations at this hook have mean square norm {self.scale}; nothing to scale")
        self.dropped = 0
        self._waiting, self._ended = first, False

    def batches(self, batch: int, tokens: int) -> Iterator[Tensor]:
        """`tokens` activations in shuffled batches `[B, D]`; the last may be short. Stops early where the text ends."""
        buffer_ND = torch.empty(0)
        while tokens > 0:
            if not self._ended and len(buffer_ND) < max(batch, self.config.buffer_tokens // 2):
                buffer_ND = self._refill(buffer_ND)
            size = min(batch, tokens, len(buffer_ND))
            if size == 0:
                return
            yield buffer_ND[-size:].to(self.device)
            buffer_ND, tokens = buffer_ND[:-size], tokens - size

    def _refill(self, remaining_ND: Tensor) -> Tensor:
        parts, held = [remaining_ND] if len(remaining_ND) else [], len(remaining_ND)
        while held < self.config.buffer_tokens:
            part = self._waiting.pop(0) if self._waiting else next(self._raw, None)
            if part is None:
                self._ended = True
                break
            parts.append(self._keep(part))
            held += len(parts[-1])
        if not parts:
            return remaining_ND
        return torch.cat(parts)[torch.randperm(held, generator=self.generator)]

    def _keep(self, x_ND: Tensor) -> Tensor:
        if not torch.isfinite(x_ND).all():
            raise ValueError("model: activations at this hook are not finite (NaN or infinity); try dtype: float32")
        if self.config.max_norm_multiple is not None:
            usual_N = x_ND.norm(dim=1) <= self.config.max_norm_multiple * self.median_norm
            self.dropped += int((~usual_N).sum())
            x_ND = x_ND[usual_N]
        return x_ND / self.scale


def _real_activations(lm: LanguageModel, rows: Rows) -> Tensor:
    """Activations `[n, D]` of the rows' real tokens, on the CPU."""
    return lm.activations(rows.ids)[rows.real.to(lm.device)].cpu()


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
        self.generator = torch.Generator().manual_seed(seed)
        norms_N = features.sample(CALIBRATION_TOKENS, torch.Generator().manual_seed(_CALIBRATION_SEED)).x_BD.norm(dim=1)
        self.median_norm = norms_N.median().item()
        self.scale = norms_N.square().mean().sqrt().item()
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"data: the activations have mean square norm {self.scale}; nothing to scale")

    def batches(self, batch: int, tokens: int) -> Iterator[Tensor]:
        """`tokens` activations in batches `[B, D]`; the last may be short."""
        held_ND = torch.empty(0, self.features.d_in)
        while tokens > 0:
            size = min(batch, tokens)
            parts = [held_ND]
            while sum(map(len, parts)) < size:
                parts.append(self.features.sample(_BLOCK, self.generator).x_BD / self.scale)
            held_ND = torch.cat(parts)
            yield held_ND[:size].to(self.device)
            held_ND, tokens = held_ND[size:], tokens - size
