"""Text of tokens for display: leading spaces are kept, and characters that span several tokens are decoded whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

_INCOMPLETE = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""
_LONGEST = 3
"""Further tokens that a character at the border may span: UTF-8 has at most four bytes."""


class Shown(NamedTuple):
    """A text, and which of its characters belong to which token."""

    text: str
    spans: list[tuple[int, int]]
    """First character and end of each token. Tokens that jointly encode one character all have that character."""


def shown(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> Shown:
    """The text of token ids as it is inside a longer text: leading spaces, which decoders strip, are kept."""
    ids = [int(i) for i in ids]
    decode = _decoder(tokenizer, ids)
    text = decode(ids)
    starts = (decode(ids[:count]) for count in range(len(ids)))
    # A text that ends inside a character decodes to U+FFFD there.
    ends = [*accumulate((min(len(start.rstrip(_INCOMPLETE)), len(text)) for start in starts), max), len(text)]
    spans: list[tuple[int, int]] = []
    for first, end in reversed(list(pairwise(ends))):  # an incomplete token gets the span of the character it begins
        spans.append((first, end) if end > first or not spans else spans[-1])
    return Shown(text, spans[::-1])


def snippet(tokenizer: Any, ids: Sequence[int] | np.ndarray, place: int, first: int, last: int) -> tuple[str, str, str]:
    """The text before, of and after the token at `place`, within the tokens `first` to `last` (inclusive).

    A character cut by these borders is completed if `ids` contains the rest, else omitted.
    """
    low, high = max(0, first - _LONGEST), min(len(ids) - 1, last + _LONGEST)
    while first > low and shown(tokenizer, ids[first : last + 1]).text.startswith(_INCOMPLETE):
        first -= 1
    while last < high and shown(tokenizer, ids[first : last + 1]).text.endswith(_INCOMPLETE):
        last += 1
    text, spans = shown(tokenizer, ids[first : last + 1])
    start, end = spans[place - first]
    token = text[start:end]
    return text[:start].lstrip(_INCOMPLETE), token.strip(_INCOMPLETE) or token, text[end:].rstrip(_INCOMPLETE)


def _decoder(tokenizer: Any, ids: list[int]) -> Callable[[list[int]], str]:
    """A function that decodes ids as if they followed another token, if one of `ids` can serve as that token."""

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    words = [(i, text) for i in dict.fromkeys(ids) if (text := decode([i])) and _INCOMPLETE not in text]
    for anchor, known in sorted(words, key=lambda word: not any(map(str.isalnum, word[1])))[:1]:
        if decode([anchor, *ids]).startswith(known):
            return lambda part: decode([anchor, *part])[len(known) :]
    return decode
