"""Tracks which latents fire, for AuxK, for the log, and to choose between the sparse and the dense path.

F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from c2r.kernels.codes import Acts, fired, l0

ALIVE_TOKENS = 500_000
"""Number of most recent tokens within which a latent must have fired to count as alive in the log."""
SPARSE_BELOW = 0.03
"""If less than this fraction of activations is non-zero, the sparse step is faster (benchmarks/sparse.py)."""


class Activity:
    """Counts the tokens since each latent last fired.

    Arguments:
        width: number of latents F.
        dead_after: a latent is dead if it has not fired for this many tokens.
    """

    def __init__(self, width: int, dead_after: int, device: torch.device) -> None:
        self.dead_after = dead_after
        self.silent_tokens_F = torch.zeros(width, dtype=torch.long, device=device)
        self.ever_fired_F = torch.zeros(width, dtype=torch.bool, device=device)
        self.share = 1.0
        """Fraction of non-zero activations in the last batch; 1 before the first batch."""

    @torch.no_grad()
    def observe(self, acts: Acts, batch: int) -> None:
        """Update the counters with the activations of one batch of `batch` tokens."""
        self.silent_tokens_F += batch
        self.share = l0(acts).item() / len(self.silent_tokens_F)
        fired_F = fired(acts)
        self.silent_tokens_F[fired_F] = 0
        self.ever_fired_F |= fired_F

    @property
    def sparse_pays(self) -> bool:
        """Whether the sparse path is faster for a method without a fixed k, judged by the last step's activations."""
        return self.share < SPARSE_BELOW

    @property
    def dead_F(self) -> Tensor:
        """Latents that have not fired for `dead_after` tokens, bool `[F]`."""
        return self.silent_tokens_F >= self.dead_after

    @property
    def alive_F(self) -> Tensor:
        """Latents that fired within the last `min(ALIVE_TOKENS, dead_after)` tokens, bool `[F]`."""
        return self.ever_fired_F & (self.silent_tokens_F < min(ALIVE_TOKENS, self.dead_after))

    def state_dict(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {"silent_tokens_F": self.silent_tokens_F, "ever_fired_F": self.ever_fired_F, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters from `state_dict`."""
        self.share = state["share"]
        for name in ("silent_tokens_F", "ever_fired_F"):
            getattr(self, name).copy_(state[name])
