"""Splitting on the dictionary: nearest neighbours and their co-firing, the pairs to read, composition by a meta-SAE.

All over alive latents, those that fired in the sample. n tokens · D width of the activations.
"""

from __future__ import annotations

import torch

from c2r.eval.bench import Bench, Outcome, Tensors, each, progress_bar
from c2r.eval.cofiring import Cofiring
from c2r.eval.composition import composition, random_composition
from c2r.eval.reading import pairs_to_read
from c2r.sae.base import SAE


@torch.no_grad()
def evaluate_splitting(bench: Bench, name: str, sae: SAE) -> Outcome:
    """Nearest neighbours among alive latents, their co-firing and their composition, on the bench's text."""
    cofiring = Cofiring(sae.W_dec)
    parts = bench.activations.x_nD.split(2048)
    with progress_bar(bench.console) as bar:
        for x_nD in bar.track(parts, description=f"splitting {name}"):
            cofiring.add(sae.encode(x_nD.to(sae.W_dec.device)))
    figures = cofiring.metrics()
    meta = composition(sae.W_dec[cofiring.alive_A], seed=bench.seed)
    floor = _composition_floor(bench, meta.rows, sae.d_in)
    shown = {key: value for key, value in figures.items() if key.startswith("max_cos")}
    return Outcome(
        name,
        "splitting",
        {
            "splitting": figures,
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
            "composition_ev": meta.explained_variance,
            "composition_ev_random": floor,
            **shown,
        },
        details=pairs_to_read(cofiring, bench.activations, bench.lm.tokenizer),
        unstructured=dict(cofiring.histograms()),
    )


def _composition_floor(bench: Bench, rows: int, d_in: int) -> float:
    """What as many random directions have; the same for all SAEs of a shape, so kept in the cache."""
    key = {"rows": rows, "d_in": d_in, "seed": bench.seed, "torch": torch.__version__, "on": bench.lm.device.type}

    def make() -> Tensors:
        floor = random_composition(rows, d_in, seed=bench.seed, device=bench.lm.device)
        return {"ev": torch.tensor(floor.explained_variance)}

    return bench.cache.get("composition", key, make)["ev"].item()


run_splitting = each("splitting", evaluate_splitting)
