"""The known features of each preset: directions, parents and probabilities.

D width of the activations · G features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.config.known_features import OverMergeTrapConfig, PairConfig, RotationTrapConfig, SyntheticConfig, TreeConfig
from c2r.known_features.generator import KnownFeatures

LARGEST = 8192
"""If there are more features than this and than D, overlaps cannot be minimised: it takes memory for G² numbers."""
_APART = 3_000_017
"""Added to seeds: an SAE with the same seed and width would otherwise be initialised with the true directions."""


def known_features(config: SyntheticConfig) -> KnownFeatures:
    """The features of a preset, in this order: parents, their children level by level, background features.

    Raises:
        ValueError: there are too many features to minimise their overlaps, or the probabilities are inconsistent.
    """
    parents, probabilities, alone = _plan(config)
    directions_GD = unit_directions(len(parents), config.d_in, config.feature_seed, orthogonal=config.orthogonal)
    if isinstance(config, OverMergeTrapConfig):
        directions_GD = with_cosine(directions_GD, config.pairs, config.kappa)
    bias_D = unit_directions(1, config.d_in, config.feature_seed + 1, orthogonal=False)[0] * config.bias
    return KnownFeatures(
        directions_GD,
        torch.tensor(parents),
        torch.tensor(probabilities),
        torch.tensor(alone) if any(alone) else None,
        magnitudes=(1 - config.magnitude_spread, 1 + config.magnitude_spread),
        scale_by_parent=config.scale_by_parent,
        bias_D=bias_D if config.bias else None,
        noise=config.noise,
        topics=config.topics,
        topic_strength=config.topic_strength,
    )


def unit_directions(features: int, d_in: int, seed: int, *, orthogonal: bool = True) -> Tensor:
    """Random unit rows `[G, D]`; with `orthogonal`, orthogonal if G ≤ D, else with minimised sum of squared overlaps.

    Raises:
        ValueError: `orthogonal` with more than `LARGEST` features, and G > D.
    """
    generator = torch.Generator().manual_seed(_APART + seed)
    rows_GD = F.normalize(torch.randn(features, d_in, generator=generator))
    if not orthogonal:
        return rows_GD
    if features <= d_in:
        return torch.linalg.qr(rows_GD.T).Q.T.contiguous()
    if features > LARGEST:
        raise ValueError(
            f"data.orthogonal: got true for {features} features in {d_in} dimensions; accepted are at most {LARGEST} "
            "features, unless there are as many dimensions; otherwise set it to false"
        )
    for _ in range(100):  # gradient steps on the sum of squared overlaps; random directions overlap by about 1/√D
        overlaps_GG = (rows_GD @ rows_GD.T).fill_diagonal_(0)
        # With longer steps, rows would overshoot along their dominant common direction and collapse onto it.
        step = min(0.2, 0.5 / torch.linalg.eigvalsh(rows_GD.T @ rows_GD)[-1].item())
        rows_GD = F.normalize(rows_GD - step * overlaps_GG @ rows_GD)
    return rows_GD


def with_cosine(directions_GD: Tensor, pairs: int, cosine: float) -> Tensor:
    """A copy with the second row of each of the first `pairs` pairs (0 and 1, 2 and 3, …) rotated to this cosine."""
    turned_GD = directions_GD.clone()
    first, second = directions_GD[0 : 2 * pairs : 2], directions_GD[1 : 2 * pairs : 2]
    across = F.normalize(second - (second * first).sum(1, keepdim=True) * first)
    turned_GD[1 : 2 * pairs : 2] = cosine * first + (1 - cosine**2) ** 0.5 * across
    return turned_GD


class _Plan(NamedTuple):
    parents: list[int]
    """Index of each feature's parent; −1: none."""
    probabilities: list[float]
    """P(on); for children, conditional on the parent being on."""
    alone: list[float]
    """P(on) of children, conditional on the parent being off."""


def _plan(config: SyntheticConfig) -> _Plan:
    if isinstance(config, TreeConfig):
        return _trees(config)
    if isinstance(config, PairConfig):
        on = config.parent_alone + config.joint
        parents, probabilities, alone = [-1, 0], [on, config.joint / on], [0.0, config.epsilon / (1 - on)]
    elif isinstance(config, RotationTrapConfig):
        parents, probabilities, alone = [-1, 0], [config.parent_probability, 1 / (1 + config.ratio)], [0.0, 0.0]
    elif isinstance(config, OverMergeTrapConfig):
        count = 2 * config.pairs
        parents, probabilities, alone = [-1] * count, [config.pair_probability] * count, [0.0] * count
    else:
        raise TypeError(f"unknown preset: {type(config).__name__}")
    others = config.background
    return _Plan(
        parents + [-1] * others, probabilities + [config.background_probability] * others, alone + [0.0] * others
    )


def _trees(config: TreeConfig) -> _Plan:
    shares = _zipf(config.children, 1.0, config.zipf)
    siblings = [config.child_probability * share / sum(shares) for share in shares]
    parents, probabilities = [-1] * config.parents, _zipf(config.parents, config.parent_probability, config.zipf)
    level = range(config.parents)
    for _ in range(config.depth):
        start = len(parents)
        parents += [parent for parent in level for _ in siblings]
        probabilities += siblings * len(level)
        level = range(start, len(parents))
    parents += [-1] * config.independent
    probabilities += _zipf(config.independent, config.independent_probability, config.zipf)
    return _Plan(parents, probabilities, [0.0] * len(parents))


def _zipf(count: int, first: float, exponent: float) -> list[float]:
    return [first * rank**-exponent for rank in range(1, count + 1)]
