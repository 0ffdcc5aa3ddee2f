"""Which tokens count: the one rule that training and every evaluation share.

A token counts if the text says so (`Rows.real`: no padding, no special token, none of `data.drop_tokens`) and if its
activation is not an outlier: its norm is at most `max_norm`. A few tokens, attention sinks among them, can have 10 to
1,000 times the usual norm; an SAE that never saw them in training is not measured on them either, or both figures are
given.

n tokens · D width of the activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Counting(NamedTuple):
    """The rule for activations at one hook point."""

    max_norm: float | None = None
    """Largest norm that counts, in the units of the model's activations; None: every token counts."""

    def counts(self, norms_n: Tensor) -> Tensor:
        """Bool `[n]`: which tokens count, by the norms `[n]` of their activations."""
        if self.max_norm is None:
            return torch.ones_like(norms_n, dtype=torch.bool)
        return norms_n <= self.max_norm

    def of(self, x_nD: Tensor) -> Tensor:
        """Bool `[n]`: which of the activations `[n, D]` count."""
        return self.counts(torch.linalg.vector_norm(x_nD, dim=1, dtype=torch.float32))


def counting_of(config: dict[str, Any]) -> Counting:
    """The rule under which the SAE of a `cfg.json` was trained; every token counts where the file does not say.

    c2r records `c2r.state.max_norm`, the largest norm that training kept.
    """
    state = (config.get("c2r") or {}).get("state") or {}
    return Counting(state.get("max_norm"))
