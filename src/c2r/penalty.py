"""C²R: cross-sample consistency regularisation (Jin et al., ICML 2026, arXiv 2606.30609).

For latent i with decoder row d_i and activations f_i over the tokens of a batch,

    j*(i) = argmax_{j≠i} cos(d_i, d_j)                                  its nearest neighbour
    L     = (1/F) Σ_i relu(cos(d_i, d_j*) − margin)² · (‖f_i‖₂ + ‖f_j*‖₂)^α

is small when near-duplicate rows stay silent or turn apart. The paper has margin = 0 and α = 1; α = 0 leaves the
activations out (OrtSAE's penalty). The norms are summed, not multiplied: an absorbed parent and its absorber
rarely fire together, and the term must see the pair when one of them fires alone.

B tokens in a batch · D width of the activations · F latents · P pairs with a cosine above the margin.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.codes import Codes, at_least_fp32, norms
from c2r.kernels.rows import gather_sum, row_dots, row_starts
from c2r.neighbors import check_decoder, inverse_norms, nearest_neighbors


def consistency_penalty(
    acts: Float[Tensor, "B F"] | Codes,
    decoder: Float[Tensor, "F D"],
    *,
    alpha: float = 1.0,
    margin: float = 0.0,
    neighbors: Int[Tensor, " F"] | None = None,
) -> Float[Tensor, ""]:
    """The penalty L in the paper's units; add λ·L to an SAE's loss.

    Only the winning pairs carry a gradient, to the decoder through their cosine and to the activations through
    their norms, which equals the gradient of the published dense form.

    Arguments:
        acts: non-negative activations, dense `[B, F]` or sparse `Codes`.
        decoder: one row a latent, `[F, D]`; rows need not have unit norm.
        alpha: exponent of the summed norms, ≥ 0.
        margin: the cosine is counted from here on, in [0, 1).
        neighbors: j*(i) `[F]` from `nearest_neighbors`, or None for an exact search here. A latent that is its own
            neighbour has none and contributes 0.

    Returns:
        A scalar. Silent pairs have gradient 0, for every α.

    Raises:
        ValueError: shapes that do not fit, F < 2, alpha < 0 or margin outside [0, 1).
    """
    check_decoder(decoder)
    width = acts.width if isinstance(acts, Codes) else _dense_width(acts)
    if width != decoder.shape[0]:
        raise ValueError(
            f"decoder: expected [F, D] with one row for each of the {width} latents of acts, got "
            f"{list(decoder.shape)}" + ("; it looks transposed" if width == decoder.shape[1] else "")
        )
    if alpha < 0:
        raise ValueError(f"alpha: got {alpha}; accepted are numbers ≥ 0")
    if not 0 <= margin < 1:
        raise ValueError(f"margin: got {margin}; accepted are numbers in [0, 1)")
    cosine_F = None
    if neighbors is None:
        neighbors, cosine_F = nearest_neighbors(decoder)
    elif neighbors.shape != (width,) or neighbors.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"neighbors: expected integers [{width}], got {neighbors.dtype} {list(neighbors.shape)}")
    return penalty_from_norms(norms(acts), decoder, neighbors.long(), cosine_F, alpha=alpha, margin=margin)


def penalty_from_norms(
    norms_F: Tensor,
    decoder_FD: Tensor,
    neighbors_F: Tensor,
    cosine_F: Tensor | None = None,
    *,
    alpha: float = 1.0,
    margin: float = 0.0,
) -> Tensor:
    """L of the module's head, given the batch norms ‖f_i‖₂ of the latents: all it needs of the activations."""
    excess_F = F.relu(pair_cosines(decoder_FD, neighbors_F, cosine_F) - margin)
    return (excess_F.square() * pair_weights(norms_F, neighbors_F, alpha)).mean()


def pair_cosines(decoder_FD: Tensor, neighbors_F: Tensor, cosine_F: Tensor | None = None) -> Tensor:
    """cos(d_i, d_j*) of each latent and its neighbour `[F]`; 0 for a zero row and for a latent without neighbour.

    `cosine_F` has the cosines where the search for neighbours has computed them, for the decoder as it is now.
    """
    of_pair_F: Any = _PairCosines.apply(decoder_FD, neighbors_F, cosine_F)
    alone_F = neighbors_F == torch.arange(len(neighbors_F), device=neighbors_F.device)
    return of_pair_F.masked_fill(alone_F, 0.0)


class _PairCosines(torch.autograd.Function):
    """F dot products, and their gradient as one weighted sum of decoder rows: no F×D tensor besides that gradient."""

    @staticmethod
    def forward(ctx: Any, decoder_FD: Tensor, neighbors_F: Tensor, cosine_F: Tensor | None) -> Tensor:
        rows_FD = at_least_fp32(decoder_FD)
        inverse_F = inverse_norms(rows_FD)
        if cosine_F is None:
            starts = torch.arange(len(rows_FD) + 1, device=rows_FD.device)
            cosine_F = row_dots(rows_FD, rows_FD, neighbors_F, starts) * inverse_F * inverse_F[neighbors_F]
        ctx.save_for_backward(decoder_FD, neighbors_F, inverse_F, cosine_F)
        return cosine_F.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        decoder_FD, neighbors_F, inverse_F, cosine_F = ctx.saved_tensors
        # ∂cos/∂d_i = (d_j/‖d_j‖ − cos·d_i/‖d_i‖) / ‖d_i‖, and the same for j; pairs without gradient are left out.
        pairs_P = grads[0].nonzero().squeeze(1)
        near_P, grad_P = neighbors_F[pairs_P], grads[0][pairs_P]
        across_P = grad_P * inverse_F[pairs_P] * inverse_F[near_P]
        turned_P = grad_P * cosine_F[pairs_P]
        own_F = torch.zeros_like(cosine_F).index_add(0, pairs_P, turned_P).index_add(0, near_P, turned_P)
        of_itself_F = torch.arange(len(cosine_F), device=cosine_F.device)
        row, order = torch.cat([pairs_P, near_P, of_itself_F]).sort(stable=True)
        source = torch.cat([near_P, pairs_P, of_itself_F])[order]
        weight = torch.cat([across_P, across_P, -own_F * inverse_F.square()])[order]
        grad_FD = gather_sum(at_least_fp32(decoder_FD), source, row_starts(row, len(cosine_F)), weight)
        return grad_FD.to(decoder_FD.dtype), None, None


def lambda_of_strength(strength: float, *, batch: int, width: int, alpha: float = 1.0) -> float:
    """The paper's λ for a dimensionless strength ρ: λ = ρ·(F/B)^(α/2).

    ‖f_i‖ grows as √B, and the penalty is a mean over F, so a λ means something else at every batch size and
    width. On activations scaled to mean ‖x‖² = 1 the same term reads ρ·F^(α/2−1)·Σ_i c_i·(rms_i + rms_j*)^α with
    rms = ‖f‖/√B. As a latent's typical rms falls as 1/√F, ρ is the pressure on a latent relative to what it earns
    in reconstruction. That one ρ serves all B and F is a conjecture; the published setting (λ = 5, B = 2048,
    F = 65,536) is ρ = 0.884.
    """
    return strength * (width / batch) ** (alpha / 2)


def strength_of_lambda(lam: float, *, batch: int, width: int, alpha: float = 1.0) -> float:
    """The dimensionless strength ρ of the paper's λ; the inverse of `lambda_of_strength`."""
    return lam / lambda_of_strength(1.0, batch=batch, width=width, alpha=alpha)


def pair_weights(norms_F: Tensor, neighbors_F: Tensor, alpha: float) -> Tensor:
    """(‖f_i‖ + ‖f_j*‖)ᵅ with gradient 0, not infinity, where a pair is silent (the published code gives NaN there)."""
    total_F = norms_F + norms_F[neighbors_F]
    if alpha == 1:
        return total_F
    silent_F = total_F == 0
    powered_F = total_F.masked_fill(silent_F, 1.0).pow(alpha)
    return powered_F if alpha == 0 else powered_F.masked_fill(silent_F, 0.0)


def _dense_width(acts: Tensor) -> int:
    if acts.ndim != 2:
        raise ValueError(f"acts: expected [B, F] (tokens, latents) or Codes, got shape {list(acts.shape)}")
    return acts.shape[1]
