"""The C²R term in training: when it applies, how strongly, and its ablations.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from c2r.config.saes import SAEConfig
from c2r.kernels.codes import Acts, norms
from c2r.losses import Encoded
from c2r.neighbors import Neighbors, random_floor
from c2r.penalty import lambda_of_strength, pair_weights, penalty_from_norms
from c2r.schedules import ramp
from c2r.step import Step


def margin_of(config: SAEConfig, d_in: int) -> float:
    """The cosine above which C²R penalises a pair of latents, for activations of width `d_in`.

    Raises:
        ValueError: `margin: floor` is 1 or more for this shape, so no cosine could exceed it.
    """
    if config.c2r is None or config.c2r.margin != "floor":
        return 0.0 if config.c2r is None else float(config.c2r.margin)
    floor = random_floor(config.width, d_in)
    if floor >= 1:
        raise ValueError(
            f"saes.{config.name}.c2r.margin: got 'floor', which is √(2 ln F / D) = "
            f"{math.sqrt(2 * math.log(config.width) / d_in):.2f} at F = {config.width} latents and D = {d_in}. No "
            "cosine exceeds 1, so C²R would have no effect; accepted here are numbers in [0, 1) (the paper uses 0)"
        )
    return floor


class Consistency:
    """The term λ·C²R of one SAE.

    Raises:
        ValueError: see `margin_of`.
    """

    def __init__(self, config: SAEConfig, d_in: int, *, seed: int) -> None:
        assert config.c2r is not None
        self.config = config.c2r
        self.margin = margin_of(config, d_in)
        self.generator = torch.Generator().manual_seed(seed)

    def applies(self, step: int) -> bool:
        """Whether the term applies in this step: every `every`-th step, beginning with `start`."""
        since = step - self.config.start
        return since >= 0 and since % self.config.every == 0

    def __call__(self, step: Step[SAEConfig], encoded: Encoded) -> Tensor:
        """λ·C²R of the activations that the method exposes to it; 0 in steps without the term."""
        if self.applies(step.number):
            return self.term(encoded.penalised, step.sae.W_dec, step.neighbors(), len(step.x_BD), step.number)
        if step.number >= self.config.start and self.config.neighbors == "lagged":
            step.neighbors()  # the decoder changes in every step, so keep the table fresh
        return step.sae.W_dec.new_zeros(())

    def lam(self, batch: int, width: int, step: int) -> float:
        """λ of this step in the paper's units, multiplied by `every` to compensate for the skipped steps."""
        c = self.config
        lam = c.lam
        if lam is None:
            lam = lambda_of_strength(c.strength or 0.0, batch=batch, width=width, alpha=c.alpha)
        return lam * c.every * ramp(step - c.start, c.warmup_steps)

    def term(self, acts: Acts, W_dec_FD: Tensor, near: Neighbors, batch: int, step: int) -> Tensor:
        """λ·C²R of `acts`, given the nearest neighbours of the decoder's rows."""
        norms_F = norms(acts)
        lam = self.lam(batch, len(norms_F), step)
        if self.config.ablation == "unit_cosine":
            return lam * pair_weights(norms_F, near.index, self.config.alpha).mean()
        if self.config.ablation == "shuffled_norms":
            norms_F = norms_F[torch.randperm(len(norms_F), generator=self.generator).to(norms_F.device)]
        return lam * penalty_from_norms(norms_F, W_dec_FD, *near, alpha=self.config.alpha, margin=self.margin)
