"""Which latents fire: counted in every step, for AuxK, for the log, and for the choice of the sparse path.

F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from c2r.kernels.codes import Acts, fired, l0

ALIVE_TOKENS = 500_000
"""A latent counts as alive in the log if it fired within this many tokens."""
SPARSE_BELOW = 0.03
"""Below this share of firing activations the sparse step is faster than the dense one (benchmarks/sparse.py)."""


class Activity:
    """Tokens since each latent last fired.

    Arguments:
        width: F.
        dead_after: tokens of silence after which a latent is dead.
    """

    def __init__(self, width: int, dead_after: int, device: torch.device) -> None:
        self.dead_after = dead_after
        self.silent_tokens_F = torch.zeros(width, dtype=torch.long, device=device)
        self.ever_fired_F = torch.zeros(width, dtype=torch.bool, device=device)
        self.share = 1.0
        """Share of the last batch's activations that fired; 1 before the first."""

    @torch.no_grad()
    def observe(self, acts: Acts, batch: int) -> None:
        """Count one batch of `batch` tokens."""
        self.silent_tokens_F += batch
        self.share = l0(acts).item() / len(self.silent_tokens_F)
        fired_F = fired(acts)
        self.silent_tokens_F[fired_F] = 0
        self.ever_fired_F |= fired_F

    @property
    def sparse_pays(self) -> bool:
        """Whether a method without a fixed k is faster on the sparse path: few fired in the last step."""
        return self.share < SPARSE_BELOW

    @property
    def dead_F(self) -> Tensor:
        """Latents silent for `dead_after` tokens, bool `[F]`."""
        return self.silent_tokens_F >= self.dead_after

    @property
    def alive_F(self) -> Tensor:
        """Latents that fired within `ALIVE_TOKENS` (or `dead_after`, if that is less), bool `[F]`."""
        return self.ever_fired_F & (self.silent_tokens_F < min(ALIVE_TOKENS, self.dead_after))

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"silent_tokens_F": self.silent_tokens_F, "ever_fired_F": self.ever_fired_F, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counters of `state_dict`."""
        self.share = state["share"]
        for name in ("silent_tokens_F", "ever_fired_F"):
            getattr(self, name).copy_(state[name])
