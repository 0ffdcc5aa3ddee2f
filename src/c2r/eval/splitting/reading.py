"""Pairs of neighbouring latents for a human reader: their figures, and the text on which each latent is strongest.

A alive latents · n tokens of the text · k tokens that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from c2r.eval.bench import TextActivations
from c2r.eval.splitting.cofiring import Cofiring
from c2r.eval.token_text import snippet

PAIRS, SNIPPETS, BEFORE, AFTER = 10, 3, 12, 6
"""Pairs per list, snippets per latent, and tokens of text before and after the central one."""


def pairs_to_read(
    cofiring: Cofiring, text: TextActivations, tokenizer: Any, place_k: Tensor | None = None
) -> list[dict[str, Any]]:
    """The ten pairs of nearest neighbours with the highest cosine and the ten with the highest φ, without repetition.

    A pair has `latents` [i, j], where j is the nearest neighbour of i, `cosine`, `phi`, `jaccard`, `p_j_given_i`,
    `p_i_given_j`, `densities`, `among_highest` (the lists that contain it: "cosine", "phi"), and `snippets`: one list
    for i and one for j, of {before, token, after, activation}.

    Arguments:
        place_k: index in the text of each token that was counted; None: all tokens were counted.
    """
    pairs = cofiring.pairs
    picked: dict[int, list[str]] = {}
    for figure, values_A in (("cosine", pairs.cosine_A), ("phi", pairs.phi_A)):
        for place in _highest(values_A, pairs.latent_A, pairs.neighbor_A):
            picked.setdefault(place, []).append(figure)
    return [
        {
            "latents": (both := [int(pairs.latent_A[place]), int(pairs.neighbor_A[place])]),
            "cosine": pairs.cosine_A[place].item(),
            "phi": pairs.phi_A[place].item(),
            "jaccard": pairs.jaccard_A[place].item(),
            "p_j_given_i": pairs.neighbor_given_latent_A[place].item(),
            "p_i_given_j": pairs.latent_given_neighbor_A[place].item(),
            "densities": [int(cofiring.fired_F[latent]) / cofiring.tokens for latent in both],
            "among_highest": figures,
            "snippets": [snippets(cofiring, latent, text, tokenizer, place_k) for latent in both],
        }
        for place, figures in picked.items()
    ]


def snippets(
    cofiring: Cofiring, latent: int, text: TextActivations, tokenizer: Any, place_k: Tensor | None = None
) -> list[dict[str, Any]]:
    """The text around the tokens on which a latent is strongest; snippets do not extend beyond the row."""
    found = []
    for place, activation in cofiring.top_tokens(latent, SNIPPETS):
        token = place if place_k is None else int(place_k[place])
        same = (text.row_n[max(0, token - BEFORE) : token + AFTER + 1] == text.row_n[token]).nonzero().squeeze(1)
        first, last = (max(0, token - BEFORE) + int(place) for place in (same[0], same[-1]))
        row = (text.row_n == text.row_n[token]).nonzero().squeeze(1)
        begin, ids = int(row[0]), text.ids_n[row[0] : row[-1] + 1].tolist()
        before, at, after = snippet(tokenizer, ids, token - begin, first - begin, last - begin)
        found.append({"before": before, "token": at, "after": after, "activation": activation})
    return found


def _highest(values_A: Tensor, latent_A: Tensor, neighbor_A: Tensor) -> list[int]:
    """Indices of the highest finite values; if two latents are each other's nearest, only the first is listed."""
    seen: set[frozenset[int]] = set()
    found = []
    for place in torch.where(values_A.isfinite(), values_A, -torch.inf).argsort(descending=True, stable=True).tolist():
        pair = frozenset((int(latent_A[place]), int(neighbor_A[place])))
        if len(found) == PAIRS or not values_A[place].isfinite():
            break
        if pair not in seen:
            seen.add(pair)
            found.append(place)
    return found
