"""Describe activations before training on them: their norms, kept tokens with large norms, and where the variance is.

In many language models a few tokens, attention sinks, have far larger norms than the rest. A filter at 10 median norms
keeps most of them. A handful of tokens then holds much of the squared norm and variance, and an SAE spends its first
steps, and some of its latents, on them. The numbers here show this before training begins, with advice on what to set.

n tokens · k kept tokens · m sampled tokens · D width of the activations · b vectors in a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

LARGE = 3.0
"""A kept token is called large if its norm exceeds this multiple of the median norm."""
MUCH, FEW = 0.1, 0.02
"""Advice to drop large tokens is given if they hold at least the first share of the squared norm and are at most the
second share of the tokens."""
MULTIPLES = (2, 5, 10)
SAMPLE = 8192
"""Maximum number of tokens from which variances are estimated."""
_NAMED, _BLOCK, _ROUNDS = 5, 8, 5
_DIGITS = 4
"""Decimal places of recorded shares of variance; further digits depend on the number of threads."""
Decode = Callable[[int], str | None]
"""Maps a token id to its text; None if it is unknown."""


def none_known(_: int) -> None:
    """A `Decode` for when there is no tokenizer."""


class Look(NamedTuple):
    """Statistics of activations at one hook point. Variances are about the mean of the tokens in question."""

    tokens: int
    median_norm: float
    largest: float
    """Largest norm, in median norms."""
    share_over: dict[str, float]
    """Share of all tokens whose norm exceeds each of `MULTIPLES` times the median norm."""
    share_dropped: float
    """Share of all tokens dropped by the filter, at this or another hook point of the run."""
    large_share: float
    """Share of the kept tokens that are large: above `LARGE` median norms."""
    large_square: float
    """Share of the kept tokens' squared norm held by the large ones."""
    first_direction: float
    """Share of the kept tokens' variance along their first principal direction."""
    first_direction_without: float
    """The same without the large tokens."""
    top_coordinate: float
    """Share of the kept tokens' variance in the coordinate with the largest variance."""
    sinks: list[dict[str, Any]]
    """The most frequent large tokens, most frequent first: `id`, `count`, and `text` (None if unknown)."""


def look_at(
    norms_n: Tensor, keep_n: Tensor, ids_n: Tensor, rows_of: Callable[[Tensor], Tensor], decode: Decode = none_known
) -> Look:
    """Describe the activations at one hook point.

    Arguments:
        norms_n: norms of the activations, fp32 `[n]`, in the model's units.
        keep_n: bool, tokens that training keeps; at least one.
        ids_n: token ids.
        rows_of: returns the activations `[m, D]` of the tokens at the given indices `[m]`.
        decode: maps a token id to its text.
    """
    median = max(norms_n.median().item(), torch.finfo(torch.float32).tiny)
    kept_k = keep_n.nonzero().squeeze(1)
    large_n = keep_n & (norms_n > LARGE * median)
    squares_n = norms_n.double().square()
    place_m = kept_k[:: -(-len(kept_k) // SAMPLE)]
    x_mD = rows_of(place_m).float()
    first, top = shares_of_variance(x_mD)
    some_large = bool(large_n[place_m].any())
    without = shares_of_variance(x_mD[~large_n[place_m]])[0] if some_large else first
    return Look(
        tokens=len(norms_n),
        median_norm=median,
        largest=norms_n.max().item() / median,
        share_over={str(times): _share(norms_n > times * median) for times in MULTIPLES},
        share_dropped=_share(~keep_n),
        large_share=int(large_n.sum()) / len(kept_k),
        large_square=(squares_n[large_n].sum() / squares_n[kept_k].sum()).item(),
        first_direction=round(first, _DIGITS),
        first_direction_without=round(without, _DIGITS),
        top_coordinate=round(top, _DIGITS),
        sinks=_most_frequent(ids_n[large_n], decode),
    )


def shares_of_variance(x_mD: Tensor) -> tuple[float, float]:
    """Shares of the variance of the rows: along their first principal direction, and in the coordinate with the largest
    variance. Both are 0 if there is no variance.

    The direction is found by randomised subspace iteration (Halko et al. 2011, arXiv 0909.4061) with a fixed seed:
    exact if the first direction dominates, otherwise slightly too low.
    """
    centred_mD = x_mD - x_mD.mean(0)
    squares_D = torch.linalg.vector_norm(centred_mD, dim=0).double().square()
    total = squares_D.sum().item()
    if not 0 < total < float("inf"):
        return 0.0, 0.0
    basis_Db = torch.randn(x_mD.shape[1], min(_BLOCK, *x_mD.shape), generator=torch.Generator().manual_seed(0)).to(x_mD)
    for _ in range(_ROUNDS):
        basis_Db = torch.linalg.qr(centred_mD.T @ (centred_mD @ basis_Db)).Q
    return torch.linalg.svdvals(centred_mD @ basis_Db)[0].item() ** 2 / total, squares_D.max().item() / total


def in_words(point: str, look: Mapping[str, Any], multiple: float | None) -> tuple[list[str], str | None]:
    """Lines for the console, and advice on what to set (None if nothing needs to change).

    Arguments:
        point: name of the hook point.
        look: a `Look` as a dictionary.
        multiple: `stream.max_norm_multiple`.
    """
    shares = ", ".join(f"{share:.2%} above {times} ×" for times, share in look["share_over"].items())
    lines = [
        f"activations at {point}, first {look['tokens']:,} tokens: median norm {look['median_norm']:.4g}; {shares} the "
        f"median; largest {look['largest']:,.1f} ×; {look['share_dropped']:.2%} dropped as outliers",
        f"  variance: {look['first_direction']:.0%} along the first principal direction, {look['top_coordinate']:.0%} "
        "in the largest coordinate",
    ]
    if not look["large_share"]:
        return lines, None
    lines[1] += f"; without tokens above {LARGE:g} ×, {look['first_direction_without']:.0%} along the first direction"
    named = ", ".join(f"token {sink['id']}" if sink["text"] is None else repr(sink["text"]) for sink in look["sinks"])
    held = (
        f"{look['large_share']:.2%} of the tokens kept have norms above {LARGE:g} × the median and hold "
        f"{look['large_square']:.0%} of the squared norm (most frequent: {named})"
    )
    matters = look["large_square"] >= MUCH and look["large_share"] <= FEW
    if not matters or (multiple is not None and multiple <= LARGE):
        return [*lines, f"  {held}"], None
    limit = "null" if multiple is None else f"{multiple:g}"
    return lines, f"{held}: stream.max_norm_multiple is {limit}; set it to {LARGE:g} to drop them"


def say_looks(looks: Mapping[str, Mapping[str, Any]], multiple: float | None, console: Console) -> None:
    """Print the statistics of activations, one `Look` per name of a hook point."""
    for point, look in looks.items():
        lines, advice = in_words(point, look, multiple)
        for line in lines:
            console.print(escape(line), highlight=False, soft_wrap=True)
        if advice is not None:
            console.print(f"  [yellow]{escape(advice)}[/]", highlight=False, soft_wrap=True)


def _share(which_n: Tensor) -> float:
    return int(which_n.sum()) / len(which_n)


def _most_frequent(ids_n: Tensor, decode: Decode) -> list[dict[str, Any]]:
    ids, counts = ids_n.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_NAMED]
    return [{"id": (i := int(ids[place])), "count": int(counts[place]), "text": decode(i)} for place in order]
