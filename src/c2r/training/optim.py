"""Adam, initialisation and the unit-norm constraint on decoder rows, as in the published trainers.

B tokens in a batch · D width of the activations · F latents · R rows of one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2r.sae.model import SAE

FAINT = 0.01
"""Norm of the encoder row of a latent that is re-initialised because its decoder row was zero."""
_ROWS, _ROWS_ON_A_GPU = 1024, 8192
"""Block sizes for passes over F×D: small enough for a CPU's cache, larger on a GPU to launch fewer kernels."""


def random_unit_rows(width: int, d_in: int, seed: int) -> Tensor:
    """Random unit vectors `[F, D]`, drawn on the CPU so that a seed gives the same vectors on every device."""
    rows_FD = torch.randn(width, d_in, generator=torch.Generator().manual_seed(seed))
    return rows_FD / rows_FD.norm(dim=1, keepdim=True)


@torch.no_grad()
def at_unit_norm(sae: SAE, seed: int) -> SAE:
    """An equivalent SAE whose decoder rows have norm 1, as training requires.

    A zero row cannot be normalised. Such a latent gets a random decoder direction from `seed` and a small encoder row
    along it (norm `FAINT`), so that the SAE's outputs hardly change.
    """
    sae = sae.with_unit_rows()
    empty_F = sae.W_dec.norm(dim=1) < 0.5
    if not bool(empty_F.any()):
        return sae
    rows_FD = random_unit_rows(sae.width, sae.d_in, seed).to(sae.W_dec)
    fresh = SAE(
        torch.where(empty_F[:, None], FAINT * rows_FD, sae.W_enc),
        sae.b_enc.masked_fill(empty_F, 0),
        torch.where(empty_F[:, None], rows_FD, sae.W_dec),
        sae.b_dec.detach().clone(),
        architecture=sae.architecture,
        extra=sae.extra._replace(
            b_mag=None if sae.b_mag is None else sae.b_mag.masked_fill(empty_F, 0),
            r_mag=None if sae.r_mag is None else sae.r_mag.masked_fill(empty_F, 0),
        ),
        subtract_b_dec=sae.subtract_b_dec,
        config=sae.config,
    )
    return fresh.requires_grad_(sae.W_dec.requires_grad)


def adam(parameters: Sequence[Tensor], lr: float) -> torch.optim.Adam:
    """Fused Adam with its state allocated up front; allocating it during the first step would fragment the heap."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), fused=True)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


@torch.no_grad()
def geometric_median(x_BD: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point `[D]` with the least summed distance to the rows, by Weiszfeld's iteration from their mean."""
    median_D = x_BD.mean(0)
    for _ in range(iterations):
        weight_B = 1 / (x_BD - median_D).norm(dim=1).clamp(min=torch.finfo(x_BD.dtype).tiny)
        moved_D = (weight_B / weight_B.sum()) @ x_BD
        settled = (moved_D - median_D).norm() < tolerance
        median_D = moved_D
        if settled:
            break
    return median_D


@torch.no_grad()
def project_gradient(W_dec_FD: Tensor) -> None:
    """Remove the component of each row's gradient along the row; renormalising would undo it anyway."""
    if W_dec_FD.grad is not None:
        most = _ROWS if W_dec_FD.device.type == "cpu" else _ROWS_ON_A_GPU
        for rows_RD, grad_RD in zip(W_dec_FD.split(most), W_dec_FD.grad.split(most), strict=True):
            with torch.autocast(rows_RD.device.type, enabled=False):
                # Clamped so that a zero row does not give a NaN gradient.
                square_R = rows_RD.norm(dim=1).square().clamp(min=torch.finfo(rows_RD.dtype).tiny)
                along_R = torch.linalg.vecdot(grad_RD, rows_RD) / square_R
            grad_RD.addcmul_(rows_RD, along_R[:, None], value=-1)


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], largest: float) -> None:
    """Scale all gradients so that their joint norm is at most `largest`; do nothing if it already is."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if norm + 1e-6 > largest:
        for grad in grads:
            grad.mul_(largest / (norm + 1e-6))


@torch.no_grad()
def normalise_rows(W_dec_FD: Tensor) -> None:
    """Scale the rows to unit norm, in place."""
    W_dec_FD.div_(W_dec_FD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(W_dec_FD.dtype).tiny))
