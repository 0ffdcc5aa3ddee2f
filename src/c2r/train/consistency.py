"""C²R as training applies it: when, how strongly, and the ablations.

F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from c2r.codes import Acts, norms
from c2r.methods import ConsistencyConfig
from c2r.neighbors import Neighbors, random_floor
from c2r.penalty import lambda_of_strength, pair_weights, penalty_from_norms
from c2r.sae.base import SAE
from c2r.train.optim import ramp


class Consistency:
    """The term λ·C²R of one SAE."""

    def __init__(self, config: ConsistencyConfig, sae: SAE, *, seed: int) -> None:
        self.config = config
        self.margin = random_floor(sae.width, sae.d_in) if config.margin == "floor" else config.margin
        self.generator = torch.Generator().manual_seed(seed)

    def applies(self, step: int) -> bool:
        """Whether this step has the term: every `every`-th from `start` on."""
        since = step - self.config.start
        return since >= 0 and since % self.config.every == 0

    def lam(self, batch: int, width: int, step: int) -> float:
        """λ of this step in the paper's units, multiplied by `every` to make up for the steps between."""
        c = self.config
        lam = c.lam
        if lam is None:
            lam = lambda_of_strength(c.strength or 0.0, batch=batch, width=width, alpha=c.alpha)
        return lam * c.every * ramp(step - c.start, c.warmup_steps)

    def term(self, acts: Acts, W_dec_FD: Tensor, near: Neighbors, batch: int, step: int) -> Tensor:
        """λ·C²R of these activations."""
        norms_F = norms(acts)
        lam = self.lam(batch, len(norms_F), step)
        if self.config.ablation == "unit_cosine":
            return lam * pair_weights(norms_F, near.index, self.config.alpha).mean()
        if self.config.ablation == "shuffled_norms":
            norms_F = norms_F[torch.randperm(len(norms_F), generator=self.generator).to(norms_F.device)]
        return lam * penalty_from_norms(norms_F, W_dec_FD, *near, alpha=self.config.alpha, margin=float(self.margin))
