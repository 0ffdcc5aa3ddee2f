"""Activations with known features: sparse sums of unit directions, with parents, exclusive children and strangers.

x = Σ_i z_i·u_i with z_i ≥ 0 known, so that what an SAE should find is known. Modelled on SynthSAEBench
(arXiv 2602.14687). B tokens in a batch · D width of the activations · G features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """A batch of synthetic activations."""

    x_BD: Tensor
    z_BG: Tensor
    """Which features are on, and how strongly."""


@dataclass(frozen=True)
class Tree:
    """Parents with mutually exclusive children, and independent features.

    A parent is on with `parent_probability`; then, with `child_probability`, one of its children is on too, each
    equally likely; a child is never on without its parent. Features are numbered parents first, then the children of
    each parent in turn, then the independent ones.
    """

    parents: int = 16
    children: int = 4
    independent: int = 32
    parent_probability: float = 0.15
    child_probability: float = 0.8
    independent_probability: float = 0.03
    d_in: int = 96
    noise: float = 0.0
    """Standard deviation of Gaussian noise added to each coordinate."""
    seed: int = 0
    """Of the directions."""

    @property
    def features(self) -> int:
        """G."""
        return self.parents * (1 + self.children) + self.independent

    @property
    def mean_l0(self) -> float:
        """Expected number of features on at once."""
        of_a_tree = self.parent_probability * (1 + self.child_probability)
        return self.parents * of_a_tree + self.independent * self.independent_probability

    def parent_of(self) -> Tensor:
        """Each feature's parent, −1 for those without, `[G]`."""
        of_children = torch.arange(self.parents).repeat_interleave(self.children)
        return torch.cat([torch.full((self.parents,), -1), of_children, torch.full((self.independent,), -1)])

    @cached_property
    def directions_GD(self) -> Tensor:
        """Unit directions `[G, D]`: random, made as orthogonal as their number allows."""
        generator = torch.Generator().manual_seed(self.seed)
        rows_GD = torch.nn.functional.normalize(torch.randn(self.features, self.d_in, generator=generator))
        for _ in range(100):  # a few steps against the squared overlaps; random directions overlap by 1/√D at first
            overlaps_GG = (rows_GD @ rows_GD.T).fill_diagonal_(0)
            rows_GD = torch.nn.functional.normalize(rows_GD - 0.2 * overlaps_GG @ rows_GD)
        return rows_GD

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """`batch` independent activations; a feature that is on has a magnitude uniform in [0.5, 1.5]."""
        on_BP = torch.rand(batch, self.parents, generator=generator) < self.parent_probability
        with_child_BP = on_BP & (torch.rand(batch, self.parents, generator=generator) < self.child_probability)
        which_BP = torch.randint(self.children, (batch, self.parents), generator=generator)
        on_BPC = torch.nn.functional.one_hot(which_BP, self.children).bool() & with_child_BP[..., None]
        on_BI = torch.rand(batch, self.independent, generator=generator) < self.independent_probability
        on_BG = torch.cat([on_BP, on_BPC.flatten(1), on_BI], dim=1)
        z_BG = on_BG * (0.5 + torch.rand(batch, self.features, generator=generator))
        x_BD = z_BG @ self.directions_GD
        if self.noise:
            x_BD = x_BD + self.noise * torch.randn(batch, self.d_in, generator=generator)
        return Sample(x_BD, z_BG)

    def scale(self, tokens: int = 20_000) -> float:
        """√(mean ‖x‖²), by which SAEs want activations divided."""
        x_BD = self.sample(tokens, torch.Generator().manual_seed(self.seed)).x_BD
        return x_BD.square().sum(1).mean().sqrt().item()
