"""Windows of text for the judge: some in which a latent fires, others in which it is silent.

n real tokens · B tokens in a batch · D width of the activations · F latents · N non-zeros · K tokens on which one
latent fires.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r.eval.bench import TextActivations
from c2r.eval.token_text import shown
from c2r.sae.model import SAE

MARKS = ("⟦", "⟧")
"""Marks around tokens on which a latent fires. SAEBench's << >> and [[ ]] also occur in source code."""
LINE_BREAK = "↵"


class Counts(NamedTuple):
    """Numbers of windows by kind, and their width; the values are SAEBench's."""

    explain_top: int = 10
    explain_sampled: int = 5
    score_top: int = 2
    score_sampled: int = 2
    score_silent: int = 10
    radius: int = 10
    """Tokens on either side of the central one; fewer at the end of a row or document."""
    floor: float = 0.01
    """Firings below this share of the latent's largest activation are neither marked nor sampled."""


class Window(NamedTuple):
    """The tokens i of the text with start ≤ i < stop."""

    start: int
    stop: int


class Examples(NamedTuple):
    """Windows of one latent; no two overlap or have the same text."""

    explain: list[Window]
    """For the explanation: the latent fires. Strongest first."""
    firing: list[Window]
    """For scoring: the latent fires."""
    silent: list[Window]
    """For scoring: the latent's activation is exactly 0 on all tokens."""


class Firings:
    """Which tokens each latent fires on, and how strongly: |z|. Needs memory for three numbers per non-zero.

    Arguments:
        count_n: bool, tokens that count; latents are treated as silent on the others. None: all tokens count.
    """

    @torch.no_grad()
    def __init__(self, sae: SAE, x_nD: Tensor, batch: int = 2048, *, count_n: Tensor | None = None) -> None:
        latents: list[Tensor] = []
        tokens: list[Tensor] = []
        strengths: list[Tensor] = []
        for start, x_BD in zip(range(0, len(x_nD), batch), x_nD.split(batch), strict=True):
            acts_BF = sae.encode(x_BD.to(sae.W_dec))
            if count_n is not None:
                not_B = ~count_n[start : start + len(x_BD)].to(acts_BF.device)
                acts_BF = acts_BF.masked_fill(not_B[:, None], 0)
            token, latent = acts_BF.nonzero(as_tuple=True)
            latents.append(latent.int().cpu())
            tokens.append((token + start).int().cpu())
            strengths.append(acts_BF[token, latent].abs().float().cpu())
        latent_N, order = torch.cat(latents).sort(stable=True)
        self.fired_F = torch.bincount(latent_N, minlength=sae.width)
        self._ends = self.fired_F.cumsum(0).tolist()
        self._tokens_N, self._strength_N = torch.cat(tokens)[order].numpy(), torch.cat(strengths)[order].numpy()

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens on which the latent fires `[K]`, ascending, and |z| there `[K]`."""
        part = slice(self._ends[latent - 1] if latent else 0, self._ends[latent])
        return self._tokens_N[part], self._strength_N[part]


class Text:
    """Token ids, and the extent of a window around each token, which ends at the row's ends and at special tokens."""

    def __init__(self, activations: TextActivations, radius: int) -> None:
        self.ids_n = activations.ids_n.numpy()
        row_n, position_n = activations.row_n.numpy(), activations.position_n.numpy()
        index_n = np.arange(len(row_n))
        opens_n = np.ones(len(row_n), dtype=bool)
        opens_n[1:] = (row_n[1:] != row_n[:-1]) | (position_n[1:] != position_n[:-1] + 1)
        first_n = np.maximum.accumulate(np.where(opens_n, index_n, 0))
        ends = np.append(index_n[opens_n][1:], len(row_n))
        end_n = ends[opens_n.cumsum() - 1]
        self.start_n, self.stop_n = np.maximum(first_n, index_n - radius), np.minimum(end_n, index_n + radius + 1)


class _Picker:
    """Takes windows one by one, skipping those that overlap an earlier one or have the same text."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.taken_n = np.zeros(len(text.ids_n), dtype=bool)
        self.words: set[bytes] = set()

    def take(self, centres: Sequence[int] | np.ndarray, wanted: int, kind: str) -> list[tuple[int, Window]]:
        found: list[tuple[int, Window]] = []
        for centre in centres:
            if len(found) == wanted:
                break
            window = Window(int(self.text.start_n[centre]), int(self.text.stop_n[centre]))
            words = self.text.ids_n[slice(*window)].tobytes()
            if words in self.words or self.taken_n[slice(*window)].any():
                continue
            self.taken_n[slice(*window)] = True
            self.words.add(words)
            found.append((int(centre), window))
        if len(found) < wanted:
            raise ValueError(f"{len(found)} distinct windows {kind}; {wanted} are needed")
        return found


def pick(text: Text, tokens_K: np.ndarray, strength_K: np.ndarray, counts: Counts, seed: tuple[int, ...]) -> Examples:
    """Pick windows of one latent: around its strongest tokens, around sampled ones, and where it is silent.

    As in SAEBench 0.6.0, tokens weaker than the strongest are sampled with probability ∝ z², and the windows of both
    kinds are divided at random between explanation and scoring. Unlike there, the latent is verified to be silent in
    the silent windows, and no two windows overlap or have the same text.

    Raises:
        ValueError: the text has too few windows of one kind; the message says how many.
    """
    rng, picker = np.random.default_rng(seed), _Picker(text)
    firing = strength_K >= counts.floor * strength_K.max(initial=0)
    tokens, strength = tokens_K[firing], strength_K[firing].astype(np.float64)
    by_strength = np.argsort(-strength, kind="stable")
    top = picker.take(tokens[by_strength], counts.explain_top + counts.score_top, "around its strongest firings")
    strength_at = dict(zip(tokens.tolist(), strength.tolist(), strict=True))
    weaker = strength < min(strength_at[centre] for centre, _ in top)
    # Sorting by E/z² with E exponentially distributed samples without replacement with probability ∝ z².
    by_chance = np.argsort(rng.exponential(size=weaker.sum()) / strength[weaker] ** 2)
    sampled = picker.take(
        tokens[weaker][by_chance], counts.explain_sampled + counts.score_sampled, "around weaker firings"
    )
    fired_n = np.zeros(len(text.ids_n) + 1, dtype=np.int64)
    fired_n[tokens_K + 1] = 1
    before_n = fired_n.cumsum()
    silent_n = (before_n[text.stop_n] == before_n[text.start_n]).nonzero()[0]
    silent = picker.take(rng.permutation(silent_n), counts.score_silent, "in which it is silent")
    rng.shuffle(top)
    rng.shuffle(sampled)
    explain = top[: counts.explain_top] + sampled[: counts.explain_sampled]
    score = top[counts.explain_top :] + sampled[counts.explain_sampled :]
    explain.sort(key=lambda found: -strength_at[found[0]])
    return Examples(*([window for _, window in part] for part in (explain, score, silent)))


def plain(tokenizer: Any, ids: Any) -> str:
    """The text of token ids, on one line."""
    return _one_line(shown(tokenizer, ids).text)


def marked(tokenizer: Any, ids: Any, active: Iterable[bool]) -> str:
    """The same, with `MARKS` around runs of active tokens.

    A character that spans several tokens is marked if any of them is active.
    """
    text, spans = shown(tokenizer, ids)
    fires = np.zeros(len(text) + 2, bool)  # one more on either side, never firing, so that every run has two ends
    for (first, end), on in zip(spans, active, strict=True):
        fires[first + 1 : end + 1] |= bool(on)
    written, start = "", 0
    for place in np.flatnonzero(fires[1:] != fires[:-1]):
        written += text[start:place] + MARKS[int(fires[place])]
        start = place
    return _one_line(written + text[start:])


def _one_line(text: str) -> str:
    return re.sub("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", LINE_BREAK, text)
