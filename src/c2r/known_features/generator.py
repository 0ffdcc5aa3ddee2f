"""Synthetic activations: sparse sums of known features, some of them parents with mutually exclusive children.

x = Σ_g z_g·u_g + bias + noise with known z ≥ 0 and unit directions u, so that it is known what an SAE should find.
Modelled on SynthSAEBench (arXiv 2602.14687). `known_features/presets.py` makes the features of a preset. No tensor of
size B×G is made: sampling works on events, a feature being on in a token.

B tokens in a batch · D width of the activations · G features · N events of a batch · C children · R roots · M topics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from c2r.kernels.codes import Codes, Support, decode, to_dense

_HELD_OUT_SEED = 1_000_003


class Sample(NamedTuple):
    """A batch of synthetic activations."""

    x_BD: Tensor
    codes: Codes
    """Which features are on, and their magnitudes."""

    @property
    def z_BG(self) -> Tensor:
        """Dense codes."""
        return to_dense(self.codes)


@dataclass(frozen=True, eq=False)
class KnownFeatures:
    """G features: their directions, and the distribution of their activations.

    A root (parent −1) is on with its `probability_G`, independently of other roots unless there are topics. If a
    feature with children is on, at most one of its children is on, each with its `probability_G`. If a root is off, at
    most one of its children is on, each with its `alone_G`. Parents have lower indices than their children.

    Arguments:
        directions_GD: unit rows.
        parent_G: index of the parent, or −1.
        probability_G: P(on); for children, conditional on the parent being on.
        alone_G: P(on) of a root's children, conditional on the root being off; None: 0.
        magnitudes: the magnitude of a feature that is on is uniformly distributed between these.
        scale_by_parent: whether a child's magnitude is multiplied by its parent's.
        bias_D: vector added to all activations; None: none.
        noise: standard deviation of Gaussian noise added to each coordinate.
        topics: number of topics. Each token has one, with equal probabilities; the n-th root belongs to topic n mod
            `topics`.
        topic_strength: c; a root is on 1 + c·(topics − 1) times as often in tokens of its own topic, and 1 − c times as
            often elsewhere. Roots of the same topic are on together with probability P·P'·(1 + c²·(topics − 1)), roots
            of different topics with P·P'·(1 − c²).

    Raises:
        ValueError: shapes do not match, directions do not have unit norm, a child precedes its parent, or probabilities
            are out of range or, summed over siblings, above 1.
    """

    directions_GD: Tensor
    parent_G: Tensor
    probability_G: Tensor
    alone_G: Tensor | None = None
    magnitudes: tuple[float, float] = (0.5, 1.5)
    scale_by_parent: bool = True
    bias_D: Tensor | None = None
    noise: float = 0.0
    topics: int = 1
    topic_strength: float = 0.0

    def __post_init__(self) -> None:
        for name in ("parent_G", "probability_G", "alone_G"):
            values_G = getattr(self, name)
            if values_G is not None and values_G.shape != (self.features,):
                raise ValueError(
                    f"{name}: got {list(values_G.shape)}; expected one value per feature, [{self.features}]"
                )
        norm_G = self.directions_GD.norm(dim=1)
        if not torch.allclose(norm_G, torch.ones_like(norm_G), atol=1e-4):
            raise ValueError(f"directions_GD: got norms {norm_G.min():.4f} to {norm_G.max():.4f}; expected unit rows")
        if bool((self.parent_G >= torch.arange(self.features)).any()) or int(self.parent_G.min()) < -1:
            raise ValueError("parent_G: expected the index of an earlier feature, or −1, for each feature")
        most = self.probability_G[self.roots].max().item() * (1 + self.topic_strength * (self.topics - 1))
        if most >= 1:
            raise ValueError(f"probability_G: got {most:.4f} for a root in its own topic; accepted are values < 1")
        for name, values_G in (("probability_G", self.probability_G), ("alone_G", self._alone_G)):
            together_G = torch.zeros(self.features).index_add(0, self.parent_G[self._born], values_G[self._born])
            if bool((values_G < 0).any()) or together_G.max() > 1 + 1e-6:
                raise ValueError(
                    f"{name}: got a minimum of {values_G.min():.4f} and a sum over siblings of {together_G.max():.4f}; "
                    "accepted are values ≥ 0 with a sum over siblings ≤ 1"
                )
        of_roots_G = (self.parent_G >= 0) & (self.parent_G[self.parent_G] < 0)
        if bool((self._alone_G[~of_roots_G] > 0).any()):
            raise ValueError("alone_G: got a value > 0 for a feature that is not the child of a root; accepted is 0")

    @property
    def features(self) -> int:
        """G, the number of features."""
        return len(self.directions_GD)

    @property
    def d_in(self) -> int:
        """D, the width of the activations."""
        return self.directions_GD.shape[1]

    @cached_property
    def roots(self) -> Tensor:
        """Features without a parent, `[R]`."""
        return (self.parent_G < 0).nonzero().squeeze(1)

    @cached_property
    def parents(self) -> Tensor:
        """Features with children."""
        return self.parent_G[self._born].unique()

    @cached_property
    def firing_G(self) -> Tensor:
        """P(on) of each feature, in closed form."""
        firing_G = self.probability_G.double().clone()
        for level in self._levels:
            above = firing_G[self.parent_G[level]]
            firing_G[level] = above * self.probability_G[level] + (1 - above) * self._alone_G[level]
        return firing_G

    @property
    def mean_l0(self) -> float:
        """Expected number of features that are on in a token."""
        return self.firing_G.sum().item()

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """Sample `batch` independent activations, on the CPU."""
        keys_N = self._roots_on(batch, generator)
        z_N = self._magnitudes(len(keys_N), generator)
        keys, z = [keys_N], [z_N]
        for depth in range(len(self._levels)):
            above_N, below_N = self._with_parent.choose(keys_N, generator)
            below_z_N = self._magnitudes(len(below_N), generator)
            if self.scale_by_parent:
                below_z_N *= z_N[above_N]
            if depth == 0 and len(self._without_parent.rows) > 0:
                _, alone_N = self._without_parent.choose(self._off(keys_N, batch), generator)
                below_N = torch.cat([below_N, alone_N])
                below_z_N = torch.cat([below_z_N, self._magnitudes(len(alone_N), generator)])
            keys_N, z_N = below_N, below_z_N
            keys.append(keys_N)
            z.append(z_N)
        keys_N, order_N = torch.cat(keys).sort()
        support = Support(keys_N % self.features, keys_N // self.features, batch, self.features)
        codes = Codes(torch.cat(z)[order_N], support)
        x_BD = decode(codes, self.directions_GD, torch.zeros(self.d_in) if self.bias_D is None else self.bias_D)
        if self.noise:
            x_BD = x_BD + self.noise * torch.randn(batch, self.d_in, generator=generator)
        return Sample(x_BD, codes)

    def held_out(self, tokens: int, seed: int = 0, batch: int = 2048) -> Iterator[Sample]:
        """`tokens` activations for evaluation, in batches; they differ from streams with seeds below a million."""
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED + seed)
        for start in range(0, tokens, batch):
            yield self.sample(min(batch, tokens - start), generator)

    def _roots_on(self, batch: int, generator: torch.Generator) -> Tensor:
        """The events of roots as keys token·G + feature, ascending.

        For each root, a Poisson process with rate −ln(1 − p) per token is sampled, which has one or more events in a
        token with probability p; duplicates are merged.
        """
        c, p_R = self.topic_strength, self.probability_G[self.roots].double()
        rate_R = -torch.log1p(-p_R * (1 - c))
        count_R = torch.poisson(rate_R * batch, generator).long()
        tokens_N = torch.randint(batch, (int(count_R.sum()),), generator=generator)
        keys_N = tokens_N * self.features + self.roots.repeat_interleave(count_R)
        if c > 0 and self.topics > 1:  # a root's additional events in tokens of its own topic
            place_B = torch.randperm(batch, generator=generator)
            size_M = torch.bincount(torch.randint(self.topics, (batch,), generator=generator), minlength=self.topics)
            topic_R = torch.arange(len(p_R)) % self.topics
            lacking_R = -torch.log1p(-p_R * (1 + c * (self.topics - 1))) - rate_R
            count_R = torch.poisson(lacking_R * size_M[topic_R], generator).long()
            topic_N = topic_R.repeat_interleave(count_R)
            within_N = (torch.rand(len(topic_N), generator=generator, dtype=torch.double) * size_M[topic_N]).long()
            tokens_N = place_B[(size_M.cumsum(0) - size_M)[topic_N] + within_N]
            keys_N = torch.cat([keys_N, tokens_N * self.features + self.roots.repeat_interleave(count_R)])
        return keys_N.unique()

    def _off(self, keys_N: Tensor, batch: int) -> Tensor:
        """Keys of the tokens and roots for which a root whose children may be on alone is off."""
        every_N = (torch.arange(batch)[:, None] * self.features + self._without_parent.rows).flatten()
        return every_N[~torch.isin(every_N, keys_N, assume_unique=True)]

    def _magnitudes(self, count: int, generator: torch.Generator) -> Tensor:
        low, high = self.magnitudes
        return low + (high - low) * torch.rand(count, generator=generator)

    @cached_property
    def _born(self) -> Tensor:
        """Features with a parent."""
        return (self.parent_G >= 0).nonzero().squeeze(1)

    @cached_property
    def _alone_G(self) -> Tensor:
        return torch.zeros_like(self.probability_G) if self.alone_G is None else self.alone_G

    @cached_property
    def _levels(self) -> list[Tensor]:
        """Features by depth, without the roots."""
        levels, above_G = [], self.parent_G < 0
        while bool((below_G := (self.parent_G >= 0) & above_G[self.parent_G]).any()):
            levels.append(below_G.nonzero().squeeze(1))
            above_G = below_G
        return levels

    @cached_property
    def _with_parent(self) -> _Choice:
        return _Choice(self.parent_G, self.probability_G)

    @cached_property
    def _without_parent(self) -> _Choice:
        return _Choice(self.parent_G, self._alone_G)


class _Choice:
    """Chooses at most one child of each parent, child c with `probability_G[c]`; children of probability 0 are omitted.

    Each parent has a row, and each of its children an interval of length `probability_G[c]` in [row, row + 1).
    """

    def __init__(self, parent_G: Tensor, probability_G: Tensor) -> None:
        children_C = ((parent_G >= 0) & (probability_G > 0)).nonzero().squeeze(1)
        self.child_C = children_C[parent_G[children_C].argsort(stable=True)]
        self.rows = parent_G[self.child_C].unique()
        self.row_G = torch.full_like(parent_G, -1)
        self.row_G[self.rows] = torch.arange(len(self.rows))
        self.row_C = self.row_G[parent_G[self.child_C]]
        length_C = probability_G[self.child_C].double()
        before_C = length_C.cumsum(0) - length_C
        within_C = before_C - before_C[torch.searchsorted(self.row_C, self.row_C)] + length_C
        self.end_C = self.row_C + within_C.clamp(max=1)

    def choose(self, keys_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of the events `keys_N` (token·G + feature) that get a child, and the keys of these children."""
        features = len(self.row_G)
        row_N = self.row_G[keys_N % features]
        at_N = row_N + torch.rand(len(keys_N), generator=generator, dtype=torch.double)
        chosen_N = torch.searchsorted(self.end_C, at_N, right=True)
        inside_N = ((row_N >= 0) & (chosen_N < len(self.child_C))).nonzero().squeeze(1)
        parents_N = inside_N[self.row_C[chosen_N[inside_N]] == row_N[inside_N]]
        return parents_N, keys_N[parents_N] // features * features + self.child_C[chosen_N[parents_N]]
