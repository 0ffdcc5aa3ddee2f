"""Which tokens count: the one rule that training and every evaluation share.

A token counts if the text says so (`Rows.real`: no padding, no special token, none of `data.drop_tokens`) and if its
activation is not an outlier: its norm is at most `max_norm`. A few tokens, attention sinks among them, can have 10 to
1,000 times the usual norm; an SAE that never saw them in training is not measured on them either, or both figures are
given.

Training drops a token at all hook points of a run where it is an outlier at one of them, so that all SAEs see the same
tokens. An evaluation asks each SAE's own file alone, so that a figure does not depend on which SAEs stand beside it.

n tokens · D width of the activations.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Point = TypeVar("Point", bound=Hashable)


class Counting(NamedTuple):
    """The rule for activations at one hook point."""

    max_norm: float | None = None
    """Largest norm that counts, in the units of the model's activations; None: every token counts."""
    median_norm: float | None = None
    """What `max_norm` is a multiple of, for messages; None: not known."""

    def counts(self, norms_n: Tensor) -> Tensor:
        """Bool `[n]`: which tokens count, by the norms `[n]` of their activations.

        NaN and infinity count, so that they are found: as outliers they would be left out in silence.
        """
        if self.max_norm is None:
            return torch.ones_like(norms_n, dtype=torch.bool)
        return (norms_n <= self.max_norm) | ~norms_n.isfinite()

    def of(self, x_nD: Tensor) -> Tensor:
        """Bool `[n]`: which of the activations `[n, D]` count."""
        return self.counts(torch.linalg.vector_norm(x_nD, dim=1, dtype=torch.float32))


class LeftOut(NamedTuple):
    """How many tokens (or words) of an evaluation do not count."""

    rule: Counting
    tokens: int
    """Of the text, those that do not count included."""
    outliers: int
    """Those that do not count."""
    unit: str = "tokens"

    @property
    def figures(self) -> dict[str, float | int | None]:
        """What a result file says."""
        return {
            f"{self.unit}_counted": self.tokens - self.outliers,
            f"outlier_{self.unit}_left_out": self.outliers,
            "max_norm": self.rule.max_norm,
            "median_norm": self.rule.median_norm,
        }

    def __str__(self) -> str:
        limit, median = self.rule.max_norm, self.rule.median_norm
        if limit is None:
            than = "any"
        else:
            than = f"a norm above {limit:.4g}" if not median else f"more than {limit / median:.3g} × the median norm"
        return (
            f"{self.outliers:,} of {self.tokens:,} {self.unit} ({self.outliers / max(1, self.tokens):.2%}) have {than} "
            "and are left out, as in training"
        )


def counting_rules(median: Mapping[Point, float], multiple: float | None) -> dict[Point, Counting]:
    """The rule at each hook point of a run: at most `multiple` times its median norm; None leaves out nothing."""
    return {point: Counting(None if multiple is None else norm * multiple, norm) for point, norm in median.items()}


def counts_at_all(rules: Mapping[Point, Counting], norms: Mapping[Point, Tensor]) -> Tensor:
    """Bool `[n]`: tokens that count at every hook point, by their norms `[n]` at each."""
    kept = [rules[point].counts(norms_n) for point, norms_n in norms.items()]
    return torch.stack(kept).all(0)


def counting_of(config: dict[str, Any]) -> Counting:
    """The rule under which the SAE of a `cfg.json` was trained; every token counts where the file does not say.

    c2r records `c2r.state.max_norm`, the largest norm that training kept.
    """
    state = (config.get("c2r") or {}).get("state") or {}
    return Counting(state.get("max_norm"), state.get("median_norm"))
