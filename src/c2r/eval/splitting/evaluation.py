"""Splitting: nearest neighbours and their co-firing, pairs of latents to read, and composition by a meta-SAE.

All figures are over alive latents: those that fired on the evaluation's text.

n tokens · k tokens that count · B tokens in a batch · D width of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from c2r.eval.bench import Bench
from c2r.eval.counted import Counted, counted
from c2r.eval.disk_cache import Tensors
from c2r.eval.outcome import FAILURES, Outcome, failure
from c2r.eval.splitting.cofiring import Cofiring, Pairs, mean_of_finite
from c2r.eval.splitting.composition import composition, random_composition
from c2r.eval.splitting.reading import pairs_to_read
from c2r.progress import progress_bar
from c2r.sae.model import SAE

EVALUATION = "splitting"


class Fired(NamedTuple):
    """One SAE's firings on the text."""

    text: Counted
    cofiring: Cofiring
    figures: dict[str, float]
    """See `Cofiring.metrics`."""


@torch.no_grad()
def run_splitting(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """Evaluate nearest neighbours among alive latents, their co-firing and their composition on the bench's text.

    With two or more SAEs, co-firing is also compared for pairs with the same cosine: the lowest mean nearest-neighbour
    cosine of these SAEs.
    """
    found: dict[str, Fired] = {}
    for name, sae in saes.items():
        try:
            found[name] = fire(bench, name, sae)
        except FAILURES as error:
            yield failure(name, EVALUATION, error)
    cosines = [fired.figures["max_cos_mean"] for fired in found.values()]
    cosines = [cosine for cosine in cosines if math.isfinite(cosine)]
    matched = min(cosines) if len(cosines) > 1 else None
    for name, fired in found.items():
        try:
            outcome = outcome_of(bench, name, saes[name], fired, matched)
        except FAILURES as error:
            outcome = failure(name, EVALUATION, error)
        yield outcome


def fire(bench: Bench, name: str, sae: SAE) -> Fired:
    """Run one SAE on the tokens that count for it."""
    text, cofiring = counted(bench, name, sae), Cofiring(sae.W_dec)
    with progress_bar(bench.console) as bar:
        for place_B in bar.track(text.place_k.split(2048), description=f"splitting {name}"):
            cofiring.add(sae.encode(text.text.x_nD[place_B].to(sae.W_dec.device)))
    return Fired(text, cofiring, cofiring.metrics())


def outcome_of(bench: Bench, name: str, sae: SAE, fired: Fired, matched: float | None) -> Outcome:
    """The result of one SAE.

    Arguments:
        matched: cosine of the pairs on which SAEs are compared; None if there is only one SAE.
    """
    text, cofiring, figures = fired
    meta = composition(sae.W_dec[cofiring.alive_A], seed=bench.config.seed)
    floor = _composition_floor(bench, meta.rows, sae.d_in)
    shown = {key: value for key, value in figures.items() if key.startswith("max_cos")}
    at_one_cosine = {} if matched is None else _matched(cofiring.at_cosine(matched, seed=bench.config.seed), matched)
    return Outcome(
        name,
        EVALUATION,
        {
            "splitting": figures | at_one_cosine,
            "composition": {
                "meta_sae_explained_variance": meta.explained_variance,
                "meta_sae_explained_variance_random": floor,
                "meta_sae_rows": meta.rows,
                "meta_sae_alive": meta.meta_alive,
            },
        },
        {
            "neighbor_phi": figures["neighbor_phi_mean"],
            "neighbor_jaccard": figures["neighbor_jaccard_mean"],
            **{key: at_one_cosine[key] for key in ("matched_phi", "matched_cosine") if key in at_one_cosine},
            "composition_ev": meta.explained_variance,
            "composition_ev_random": floor,
            **shown,
        },
        details=pairs_to_read(cofiring, text.text, bench.lm.tokenizer, text.place_k),
        unstructured={**cofiring.histograms(), "counting": text.left_out.figures},
    )


def _matched(pairs: Pairs, cosine: float) -> dict[str, float]:
    """Figures of the pairs selected at `cosine`."""
    return {
        "matched_cosine": cosine,
        "matched_cosine_mean": mean_of_finite(pairs.cosine_A),
        "matched_phi": mean_of_finite(pairs.phi_A),
        "matched_jaccard": mean_of_finite(pairs.jaccard_A),
        "matched_pairs": len(pairs.latent_A),
    }


def _composition_floor(bench: Bench, rows: int, d_in: int) -> float:
    """The meta-SAE's EV of as many random directions; it depends only on the shape, so it is kept in the cache."""
    key = {
        "rows": rows,
        "d_in": d_in,
        "seed": bench.config.seed,
        "torch": torch.__version__,
        "on": bench.lm.device.type,
    }

    def make() -> Tensors:
        floor = random_composition(rows, d_in, seed=bench.config.seed, device=bench.lm.device)
        return {"ev": torch.tensor(floor.explained_variance)}

    return bench.cache.get("composition", key, make)["ev"].item()
