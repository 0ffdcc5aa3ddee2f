"""Tokens as a reader sees them: leading spaces survive, and characters spread over several tokens are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

_INCOMPLETE = "\ufffd"
"""What bytes decode to that are no character yet."""
_LONGEST = 3
"""Tokens to either side that may belong to a character at the border: UTF-8 has at most four bytes."""


class Shown(NamedTuple):
    """A text and which of its characters come from which token."""

    text: str
    spans: list[tuple[int, int]]
    """First character and end of each token. Tokens that make up one character together all have that character."""


def shown(tokenizer: Any, ids: Sequence[int]) -> Shown:
    """The text of token ids within a text, so that what decoders strip at the beginning of one is there."""
    ids = [int(i) for i in ids]
    decode = _decoder(tokenizer, ids)
    text = decode(ids)
    starts = (decode(ids[:count]) for count in range(len(ids)))
    # An end in mid-character comes out as U+FFFD.
    ends = [*accumulate((min(len(start.rstrip(_INCOMPLETE)), len(text)) for start in starts), max), len(text)]
    spans: list[tuple[int, int]] = []
    for first, end in reversed(list(pairwise(ends))):  # a token without an end of its own belongs to what it begins
        spans.append((first, end) if end > first or not spans else spans[-1])
    return Shown(text, spans[::-1])


def snippet(tokenizer: Any, ids: Sequence[int], place: int, first: int, last: int) -> tuple[str, str, str]:
    """The text before, of and after the token at `place`, from token `first` to `last`, which is included.

    A character that the borders would cut is completed where `ids` has the rest, else left out.
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
    """Decodes ids that stand after another token, where one of them can be that."""

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    words = [(i, text) for i in dict.fromkeys(ids) if (text := decode([i])) and _INCOMPLETE not in text]
    for anchor, known in sorted(words, key=lambda word: not any(map(str.isalnum, word[1])))[:1]:
        if decode([anchor, *ids]).startswith(known):
            return lambda part: decode([anchor, *part])[len(known) :]
    return decode
