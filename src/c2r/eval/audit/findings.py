"""Findings about any SAE, from its folder and some text, worded so that they need no manual.

Nothing here depends on how the SAE was trained. A marked finding violates a rule of thumb, which it states; these rules
are judgement, not measurement.

A alive latents · B tokens in a batch · D width of the activations · F latents · G batches · n tokens ·
R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from c2r.eval.fidelity import Fidelity
from c2r.eval.splitting.cofiring import Cofiring
from c2r.kernels.nearest import TILE
from c2r.neighbors import nearest_neighbors, unit_rows
from c2r.penalty import lambda_of_strength, penalty_from_norms
from c2r.sae.model import SAE

PUBLISHED_STRENGTH, PUBLISHED_BATCH = 0.884, 2048


class Finding(NamedTuple):
    """One observation."""

    topic: str
    says: str
    """What was measured, with the number."""
    means: str
    """How to interpret it."""
    marked: bool
    """Whether it violates a rule of thumb."""
    figures: dict[str, float]


class Seen(NamedTuple):
    """Statistics collected in one pass over the text."""

    sae: SAE
    cofiring: Cofiring
    fidelity: dict[str, float]
    """See `Fidelity.metrics`."""
    density_F: Tensor
    norm_GF: Tensor
    """‖f_i‖ of each latent over each batch of random tokens; batches have about the published size."""
    size_G: Tensor
    """Tokens per batch."""
    mean_square: float
    """Mean ‖x‖²."""


@torch.no_grad()
def look(sae: SAE, x_nD: Tensor, track: Callable[[list[Any]], Iterable[Any]] = iter) -> Seen:
    """Run the SAE over activations once.

    Arguments:
        track: wraps an iteration over pieces of the text, to show progress.

    Raises:
        ValueError: the weights are not finite.
    """
    for name, weight in sae.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: {int((~weight.isfinite()).sum())} of {weight.numel()} numbers are not finite")
    cofiring, fidelity = Cofiring(sae.W_dec), Fidelity(sae.width, sae.d_in)
    # Norms depend on the batch, and neighbouring tokens are similar: batches are random, as in training.
    batches = max(1, len(x_nD) // PUBLISHED_BATCH)
    batch_n = (torch.randperm(len(x_nD), generator=torch.Generator().manual_seed(0)) % batches).to(sae.W_dec.device)
    square_GF = torch.zeros(batches, sae.width, device=sae.W_dec.device)
    for part, batch_B in track(list(zip(x_nD.split(2048), batch_n.split(2048), strict=True))):
        x_BD = part.to(sae.W_dec.device)
        acts_BF = sae.encode(x_BD)
        cofiring.add(acts_BF)
        fidelity.add(x_BD, sae.decode(acts_BF), acts_BF)
        square_GF.index_add_(0, batch_B, acts_BF.square())
    mean_square = fidelity.sums["square"] / fidelity.tokens
    size_G = torch.bincount(batch_n, minlength=batches)
    return Seen(sae, cofiring, fidelity.metrics(), fidelity.density_F, square_GF.sqrt(), size_G, mean_square)


def findings(seen: Seen) -> list[Finding]:
    """All findings, in reading order."""
    return [
        _reconstruction(seen), _sparsity(seen), _shrinkage(seen), _dead(seen), _dense(seen), _duplicates(seen),
        _neighbors(seen), _penalty(seen), _norms(seen),
    ]  # fmt: skip


def count_close_pairs(decoder_AD: Tensor, thresholds: tuple[float, ...]) -> list[int]:
    """Number of pairs of rows with a cosine above each threshold; each pair is counted once."""
    unit_AD = unit_rows(decoder_AD)
    counts = [0] * len(thresholds)
    for top in range(0, len(unit_AD), TILE):
        for left in range(top, len(unit_AD), TILE):
            cosine_RR = unit_AD[top : top + TILE] @ unit_AD[left : left + TILE].T
            if left == top:
                cosine_RR = cosine_RR.triu(1)
            counts = [n + int((cosine_RR > t).sum()) for n, t in zip(counts, thresholds, strict=True)]
    return counts


def _reconstruction(seen: Seen) -> Finding:
    ev = seen.fidelity["explained_variance"]
    says = f"It explains {ev:.1%} of the variance of the activations (EV), measured on {seen.cofiring.tokens:,} tokens."
    means = "The latents do not describe the rest; CE recovered (core) measures whether the model needs it."
    if not ev > 0:
        means = "Predicting the mean would do better. Is this the model, layer and scale that it was trained on?"
    elif ev < 0.5:
        means = "Less than half: the latents miss most of the activations. Is this the layer that it was trained on?"
    return Finding("reconstruction", says, means, not ev >= 0.5, {"explained_variance": ev})


def _sparsity(seen: Seen) -> Finding:
    l0 = seen.fidelity["l0"]
    training = seen.sae.config.get("c2r", {}).get("sae", {})
    meant = seen.sae.k or training.get("k") or training.get("target_l0")
    says = f"{l0:.1f} of {seen.sae.width:,} latents are active on a token (L0)."
    means = "Compare SAEs only at equal L0: nearly every metric depends on it."
    off = meant is not None and abs(l0 / meant - 1) > 0.2
    if meant is not None:
        says += f" Its file asks for {meant:g}."
    if off:
        means = (
            "L0 is off by more than a fifth: the learned threshold, which replaces training's top-k selection, does "
        )
        means += "not fit this text."
    return Finding("sparsity", says, means, off or l0 == 0, {"l0": l0})


def _shrinkage(seen: Seen) -> Finding:
    ratio, bias = seen.fidelity["l2_ratio"], seen.fidelity["relative_reconstruction_bias"]
    says = f"Reconstructions x̂ are {ratio:.3f} times as long as the activations x; E‖x̂‖²/E[x·x̂] is {bias:.3f}."
    means = "The second ratio is close to 1, as it should be."
    if bias < 0.95:
        means = "The second ratio is below 0.95: latents are too weak, as a sparsity penalty on their size makes them."
    elif bias > 1.05:
        means = "The second ratio is above 1.05: latents are too strong, or several of them represent the same thing."
    figures = {"l2_ratio": ratio, "relative_reconstruction_bias": bias}
    return Finding("shrinkage", says, means, not 0.95 <= bias <= 1.05, figures)


def _dead(seen: Seen) -> Finding:
    share, n = (seen.density_F == 0).double().mean().item(), seen.cofiring.tokens
    says = f"{share:.1%} of the latents never fired in {n:,} tokens."
    means = (
        f"A latent that fires on one token in {max(1, n // 3):,} looks dead with probability 0.05; use more text to "
    )
    means += "find rarer ones."
    if share > 0.1:
        means = f"More than a tenth of the latents is unused, or needs other text to fire. {means}"
    return Finding("dead latents", says, means, share > 0.1, {"share_dead": share})


def _dense(seen: Seen) -> Finding:
    dense = (seen.density_F > 0.1).nonzero().squeeze(1)
    of_firings = (seen.density_F[dense].sum() / seen.density_F.sum().clamp(min=1e-12)).item()
    most = dense[seen.density_F[dense].argsort(descending=True)][:5].tolist()
    says = f"{len(dense)} latents fire on more than a tenth of the tokens and make up {of_firings:.1%} of all firings"
    says += f"; the densest: {', '.join(map(str, most))}." if most else "."
    means = "Dense latents seldom have a single meaning; often they encode position, norm or what all tokens share."
    marked = len(dense) > 0.01 * seen.sae.width
    return Finding("dense latents", says, means, marked, {"dense": len(dense), "dense_share_of_firings": of_firings})


def _duplicates(seen: Seen) -> Finding:
    over_07, over_09 = count_close_pairs(seen.sae.W_dec[seen.cofiring.alive_A], (0.7, 0.9))
    figures = seen.cofiring.metrics()
    mean, floor = figures["max_cos_mean"], figures["max_cos_random_floor"]
    says = (
        f"{over_09} pairs of alive latents have a cosine above 0.9, {over_07} above 0.7. The mean cosine of a latent "
    )
    says += f"with its nearest neighbour is {mean:.2f}; for as many random directions it is about {floor:.2f}."
    means = "No two latents have nearly the same direction."
    if over_07:
        means = (
            "Latents with a cosine above 0.9 are near-copies, those above 0.7 overlap strongly; the page shows pairs."
        )
    marked = over_09 > 0 or figures["max_cos_share_over_0_7"] > 0.01
    counts = {"pairs_over_0_7": over_07, "pairs_over_0_9": over_09, "max_cos_mean": mean, "max_cos_random_floor": floor}
    return Finding("near-duplicates", says, means, marked, counts)


def _neighbors(seen: Seen) -> Finding:
    pairs = seen.cofiring.pairs
    close, known = pairs.cosine_A > 0.7, pairs.phi_A.isfinite()
    together, apart = (int((close & known & side).sum()) for side in (pairs.phi_A > 0, pairs.phi_A <= 0))
    mean = pairs.phi_A[known].mean().item() if bool(known.any()) else float("nan")
    says = (
        f"The firings of nearest neighbours correlate with φ = {mean:.3f} on average. Of the latents whose neighbour "
    )
    says += f"has a cosine above 0.7, {together} tend to fire with it (φ > 0) and {apart} do not."
    means = "Similar latents that fire together look like duplicates; those that do not look like a split feature."
    means += " C²R lowers the mean by construction, because it moves nearest neighbours apart."
    figures = {"neighbor_phi_mean": mean, "close_firing_together": together, "close_firing_apart": apart}
    return Finding("co-firing", says, means, apart + together > 0.01 * seen.sae.width, figures)


def _penalty(seen: Seen) -> Finding:
    sae = seen.sae
    near_F = nearest_neighbors(sae.W_dec).index
    # In units with mean ‖x‖² = 1, as in training: dividing x by a scale divides f by it.
    penalties = [
        penalty_from_norms(norm_F / seen.mean_square**0.5, sae.W_dec, near_F).item()
        * lambda_of_strength(1.0, batch=size, width=sae.width)
        for norm_F, size in zip(seen.norm_GF, seen.size_G.tolist(), strict=True)
    ]
    penalty = sum(penalties) / len(penalties)
    loss = seen.fidelity["mse"] / seen.mean_square
    published = PUBLISHED_STRENGTH * penalty / loss if loss else float("nan")
    says = (
        f"The consistency penalty at strength ρ = 1 is {penalty:.4f}, for activations scaled to mean square norm 1, in "
    )
    says += f"batches of {int(seen.size_G[0]):,} random tokens; at the published ρ = {PUBLISHED_STRENGTH} it is "
    says += f"{published:.3f} times the reconstruction loss."
    means = "C²R minimises this. It is high if near-duplicates are active; it is no evidence of good or bad features."
    return Finding("consistency penalty", says, means, False, {"penalty_at_1": penalty, "penalty_ratio": published})


def _norms(seen: Seen) -> Finding:
    norm_F = seen.sae.W_dec.norm(dim=1) if seen.sae.given_norms_F is None else seen.sae.given_norms_F
    off = (norm_F - 1).abs().max().item()
    says = f"The norms of decoder rows differ from 1 by at most {off:.2g}."
    means = "Activations of different latents are on the same scale."
    if off > 0.01:
        means = "In the file, latents have different scales; here, activations are multiplied by the norm of their row."
    return Finding("decoder norms", says, means, off > 0.01, {"decoder_norm_off": off})
