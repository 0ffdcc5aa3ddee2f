"""Absorption of single samples: how much of the probe's projection comes from latents other than the concept's own.

D width of the activations · F latents · n samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from c2r.config.evaluations import AbsorptionSettings

SILENT = 1e-8
"""Activations below this count as zero."""


def score_samples(
    x_nD: Tensor, z_nF: Tensor, unit_nD: Tensor, cosine_nF: Tensor, main_nF: Tensor, settings: AbsorptionSettings
) -> tuple[Tensor, Tensor]:
    """Absorption fraction (fp64 `[n]`) and full absorption (bool `[n]`) of samples.

    Let P be the projection x·u on the probe's unit direction, p_i = z_i·cos(u, d_i), M the sum of p over the class's
    own latents, and A the sum of the three largest p of other latents with cosine ≥ 0.1. The fraction is 0 if M ≥ P or
    A/P < 0.4, else 1 if M ≤ 0, else a/(a + M) with a = min(A, P − M). A sample is fully absorbed if none of the class's
    own latents fires, and the largest p is at least 0.4·P and belongs to a latent with cosine ≥ 0.025.

    Arguments:
        unit_nD: unit direction of the probe of each sample's class.
        cosine_nF: cosine of that direction with every decoder row.
        main_nF: bool, the class's own latents.
    """
    p_nF = z_nF * cosine_nF
    projection_n = (x_nD * unit_nD).sum(1).double()
    main_n = (p_nF * main_nF).sum(1).double()
    absorbing_nF = ~main_nF & (cosine_nF >= settings.absorber_cosine) & (p_nF > 0)
    largest = p_nF.where(absorbing_nF, 0).topk(min(settings.absorbers, p_nF.shape[1]), dim=1).values
    others_n = largest.sum(1).double()
    # If the projection is not positive, both scores are 0.
    scale_n = projection_n.where(projection_n > 0, torch.inf)
    carried_n = torch.minimum(others_n, projection_n - main_n)
    fraction_n = (carried_n / (carried_n + main_n)).where(main_n > 0, 1.0)
    fraction_n = fraction_n.where((main_n < projection_n) & (others_n / scale_n >= settings.min_projection), 0.0)
    top_n, at_n = p_nF.max(1)
    full_n = (~main_nF | (z_nF < SILENT)).all(1) & (top_n.double() / scale_n >= settings.min_projection)
    return fraction_n, full_n & (cosine_nF.gather(1, at_n[:, None])[:, 0] >= settings.full_cosine)
