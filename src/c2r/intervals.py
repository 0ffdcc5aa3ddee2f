"""95 % confidence intervals over a few seeds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

Interval = tuple[float, float]


def interval_95(values: Sequence[float]) -> Interval | None:
    """Student's 95 % interval for the mean of independent `values`; None for fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def share_interval_95(values: Sequence[float]) -> Interval | None:
    """`interval_95` for the mean of fractions, clipped to [0, 1].

    The mean of fractions is between 0 and 1, so clipping does not reduce coverage.
    """
    found = interval_95(values)
    return None if found is None else (max(0.0, found[0]), min(1.0, found[1]))


def paired_interval_95(first: Sequence[float], last: Sequence[float]) -> Interval | None:
    """Student's 95 % interval for the mean of `last` − `first`, paired value by value; None for fewer than two pairs.

    Raises:
        ValueError: the two sequences have different lengths.
    """
    return interval_95([b - a for a, b in zip(first, last, strict=True)])


def bootstrap_95(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> Interval | None:
    """Percentile bootstrap's 95 % interval for the mean of independent `values`; None for fewer than two.

    Values are drawn with replacement; with paired differences as values this is the paired bootstrap.
    """
    if len(values) < 2:
        return None
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
