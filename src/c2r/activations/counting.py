"""Which tokens count: a single rule, shared by training and all evaluations.

A token counts if it is real (`Rows.real`: not padding, not a special token, not in `data.drop_tokens`) and its
activation is not an outlier, that is, its norm is at most `max_norm`. A few tokens, such as attention sinks, can have
10 to 1,000 times the usual norm. An SAE that never saw them in training is not evaluated on them, or both results are
reported.

Training drops a token at all hook points of a run if it is an outlier at any of them, so that all SAEs see the same
tokens. An evaluation uses only the limit in each SAE's own file, so that an SAE's results do not depend on which other
SAEs are evaluated with it.

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
    """Largest norm that counts, in units of the model's activations; None: every token counts."""
    median_norm: float | None = None
    """The median norm, of which `max_norm` is a multiple; only for messages. None: unknown."""

    def counts(self, norms_n: Tensor) -> Tensor:
        """Bool `[n]`: which tokens count, given the norms `[n]` of their activations.

        NaN and infinity count, so that they are detected later; as outliers they would be dropped silently.
        """
        if self.max_norm is None:
            return torch.ones_like(norms_n, dtype=torch.bool)
        return (norms_n <= self.max_norm) | ~norms_n.isfinite()

    def of(self, x_nD: Tensor) -> Tensor:
        """Bool `[n]`: which of the activations `[n, D]` count."""
        return self.counts(torch.linalg.vector_norm(x_nD, dim=1, dtype=torch.float32))


class LeftOut(NamedTuple):
    """Number of tokens (or words) that an evaluation leaves out."""

    rule: Counting
    tokens: int
    """All tokens of the text, including outliers."""
    outliers: int
    """Tokens left out."""
    unit: str = "tokens"

    @property
    def figures(self) -> dict[str, float | int | None]:
        """The entries of a result file."""
        return {
            f"{self.unit}_counted": self.tokens - self.outliers,
            f"outlier_{self.unit}_left_out": self.outliers,
            "max_norm": self.rule.max_norm,
            "median_norm": self.rule.median_norm,
        }

    def __str__(self) -> str:
        limit, median = self.rule.max_norm, self.rule.median_norm
        if limit is None:
            than = "too large a norm (no limit was recorded)"
        else:
            than = f"a norm above {limit:.4g}" if not median else f"more than {limit / median:.3g} × the median norm"
        return (
            f"{self.outliers:,} of {self.tokens:,} {self.unit} ({self.outliers / max(1, self.tokens):.2%}) have {than} "
            "and are left out, as in training"
        )


def counting_rules(median: Mapping[Point, float], multiple: float | None) -> dict[Point, Counting]:
    """The rule at each hook point of a run: norms of at most `multiple` times the median; None: every token counts."""
    return {point: Counting(None if multiple is None else norm * multiple, norm) for point, norm in median.items()}


def counts_at_all(rules: Mapping[Point, Counting], norms: Mapping[Point, Tensor]) -> Tensor:
    """Bool `[n]`: tokens that count at every hook point, given their norms `[n]` at each."""
    kept = [rules[point].counts(norms_n) for point, norms_n in norms.items()]
    return torch.stack(kept).all(0)


def counting_of(config: dict[str, Any]) -> Counting:
    """The rule used to train the SAE of a `cfg.json`; every token counts if the file records none.

    c2r records it as `c2r.state.max_norm`, the largest norm kept in training.
    """
    state = (config.get("c2r") or {}).get("state") or {}
    return Counting(state.get("max_norm"), state.get("median_norm"))
