"""Cut long text into pieces that tokenize exactly like the whole, so that a book or a large file needs little memory.

Text is cut only between a letter and a space or line break followed by a letter, or after a line break followed by a
letter; only if no vocabulary entry contains two such characters side by side, so that no token can span the cut; and
only for tokenizers whose components are known to look at a few characters at a time. Then byte-pair encoding never
merges across the cut, so both sides are tokenized independently, and the best path of a unigram model passes through
the cut. Special treatment of the beginning of a text (SentencePiece inserts a space) is undone by encoding each piece
together with the end of the preceding one, whose tokens are then dropped. Each cut is checked on the text around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PIECE, BEFORE = 65_536, 64
"""Minimum length of a piece, and length of the preceding text that is kept with it, in characters."""
_STEP, _NEAR, _TRIES = 4096, 8, 16
_NORMALIZERS = {
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Strip", "Replace", "Prepend",
    "Precompiled", "BertNormalizer",
}  # fmt: skip
_SPLITTERS = {
    "Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit",
    "BertPreTokenizer", "CharDelimiterSplit",
}  # fmt: skip
_WORDS = {"Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
"""Pre-tokenizers that end each pre-token at a space."""


class Piece(NamedTuple):
    """Consecutive characters of a text."""

    before: str
    """The end of the preceding text; "" at the beginning."""
    text: str
    end: int
    """Number of characters in the text up to the end of this piece."""
    more: bool
    """Whether more pieces follow."""


class Cuts:
    """Finds places where text can be cut so that its pieces get the same tokens as the whole text.

    Arguments:
        tokenizer: tokenizer of the language model. Text is never cut for tokenizers with unknown components (such as
            those written in Python).
        encode: maps text to token ids without adding special tokens.
    """

    def __init__(self, tokenizer: Any, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        places = _places(tokenizer)
        self._pattern = re.compile("|".join(places)) if places else None

    @property
    def possible(self) -> bool:
        """Whether text can be cut at all for this tokenizer."""
        return self._pattern is not None

    def find(self, text: str, start: int, stop: int) -> int | None:
        """The first place in `text[start:stop]` where a new piece may begin; None if there is none."""
        if self._pattern is None:
            return None
        for tried, match in enumerate(self._pattern.finditer(text, start, stop)):
            if self._holds(text, match.end()):
                return match.end()
            if tried == _TRIES:
                break
        return None

    def _holds(self, text: str, cut: int) -> bool:
        """Whether the tokens before a cut are unchanged by the text after it, and those after it do not depend on how
        much preceding text is given.
        """
        after, found = text[cut : cut + BEFORE], []
        for length in (BEFORE, _NEAR):
            before = text[cut - length : cut]
            first, both = self.encode(before), self.encode(before + after)
            if both[: len(first)] != first:
                return False
            found.append(both[len(first) :])
        return found[0] == found[1]


def pieces(read: Callable[[int], str], cuts: Cuts | None, skip: int = 0) -> Iterator[Piece]:
    """The pieces of a text, starting at character `skip`, where an earlier piece ended.

    The end of a piece depends only on the text after its beginning, so resuming gives the same pieces.

    Arguments:
        read: returns the next characters, as many as requested; fewer at the end of the text.
        cuts: where the text can be cut; None: the text is one piece.
    """
    before, end = "", 0
    while end < skip and (text := read(min(PIECE, skip - end))):
        before, end = (before + text)[-BEFORE:], end + len(text)
    if cuts is None or not cuts.possible:
        while part := read(PIECE):
            text = "".join([part, *iter(lambda: read(16 * PIECE), "")])
            yield Piece(before, text, end + len(text), False)
        return
    text, ended = "", False
    while True:
        at, step, cut = PIECE, _STEP, None
        while cut is None:
            if not ended and (missing := at + step + BEFORE - len(text)) > 0:
                text += (part := read(missing))
                ended = len(part) < missing
            if ended and len(text) < at + step + BEFORE:
                break
            cut = cuts.find(text, at, at + step)
            at, step = at + step, 2 * step
        if cut is None:
            if text:
                yield Piece(before, text, end + len(text), False)
            return
        end += cut
        yield Piece(before, text[:cut], end, True)
        before, text = text[cut - BEFORE : cut], text[cut:]


def characters(text: str) -> Callable[[int], str]:
    """A `read` function (see `pieces`) over a string."""
    at = 0

    def read(count: int) -> str:
        nonlocal at
        at += count
        return text[at - count : at]

    return read


def _places(tokenizer: Any) -> list[str]:
    """Regular expressions that match up to a cut, with a lookahead; empty if no cut is known to be safe."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    try:
        normalizers, splitters = (_types(getattr(inner, part)) for part in ("normalizer", "pre_tokenizer"))
        model = type(inner.model).__name__ if inner is not None else ""
        dropout = getattr(inner.model, "dropout", None) if inner is not None else None
    except Exception:  # components written in Python cannot be inspected; they raise many types of errors
        return []
    if not set(normalizers) <= _NORMALIZERS or not set(splitters) <= _SPLITTERS or dropout:
        return []
    if model != "BPE" and not (model in ("Unigram", "WordPiece", "WordLevel") and _splits_words(splitters)):
        return []
    # As written in the vocabulary: byte-level tokenizers use one character per byte, SentencePiece ▁ for a space.
    if "ByteLevel" in splitters:
        letter, blank, line = "(?![ĠĊčĉ])[A-Za-z\u00a1-\u0143]", "Ġ", "Ċ"
    else:
        letter, blank, line = r"[^\W\d_]", "[ ▁]", "\n"
    written = r"[^\W\d_]"
    sides = [(letter, blank, f"{written}(?= {written})"), (letter, line, f"{written}(?=\n{written})")]
    sides.append((line, letter, f"\n(?={written})"))
    if model != "BPE":
        sides = sides[:1]
    vocabulary, added = "\0".join(tokenizer.get_vocab()), "\0".join(map(str, tokenizer.get_added_vocab()))
    return [
        place
        for first, second, place in sides
        if not re.search(first + second, vocabulary) and not re.search(place, added)
    ]


def _types(part: Any) -> dict[str, Any]:
    """Types of the components of a normalizer or pre-tokenizer, with their settings."""
    if part is None:
        return {}
    found: dict[str, Any] = {}
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        state = waiting.pop()
        found[state["type"]] = state
        waiting += state.get("normalizers", []) + state.get("pretokenizers", [])
    return found


def _splits_words(splitters: dict[str, Any]) -> bool:
    return any(splitters[name].get("split", True) for name in _WORDS.intersection(splitters))
