"""Long text in pieces whose tokens are those of the whole, so that a book or a corpus in one file needs little memory.

Text is cut only between a letter and a space or line break that a letter follows, or after a line break that a letter
follows; only if no entry of the vocabulary has two such characters side by side, so that no token can span the cut;
and only for tokenizers whose parts are known to look at a few characters at a time. Then no merge of byte-pair encoding
ever joins the two sides, so each develops as it would alone, and the best path of a unigram model passes through the
cut. What a tokenizer does at the beginning of a text (SentencePiece puts a space there) is undone by encoding each
piece together with the end of the preceding one, whose tokens are then dropped. At each cut this is checked on the
text around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PIECE, BEFORE = 65_536, 64
"""Characters of a piece, at least, and of the piece before it that are given with it."""
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
"""Those that end each pre-token at a space."""


class Piece(NamedTuple):
    """Consecutive characters of a text."""

    before: str
    """The end of the text before it; "" at the beginning."""
    text: str
    end: int
    """Characters of the text up to its end."""
    more: bool
    """Whether others follow."""


class Cuts:
    """Where text can be cut so that a tokenizer gives the pieces the tokens of the whole.

    Arguments:
        tokenizer: of the language model. One whose parts are not known (such as one in Python) gets its text whole.
        encode: text to token ids, nothing added.
    """

    def __init__(self, tokenizer: Any, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        places = _places(tokenizer)
        self._pattern = re.compile("|".join(places)) if places else None

    @property
    def possible(self) -> bool:
        """Whether there is any such place."""
        return self._pattern is not None

    def find(self, text: str, start: int, stop: int) -> int | None:
        """The first place from `start` on, before `stop`, after which a piece may begin; None if there is none."""
        if self._pattern is None:
            return None
        for tried, match in enumerate(self._pattern.finditer(text, start, stop)):
            if self._holds(text, match.end()):
                return match.end()
            if tried == _TRIES:
                break
        return None

    def _holds(self, text: str, cut: int) -> bool:
        """Whether the tokens after a cut follow those before it, and do not depend on how much of these is given."""
        after, found = text[cut : cut + BEFORE], []
        for length in (BEFORE, _NEAR):
            before = text[cut - length : cut]
            first, both = self.encode(before), self.encode(before + after)
            if both[: len(first)] != first:
                return False
            found.append(both[len(first) :])
        return found[0] == found[1]


def pieces(read: Callable[[int], str], cuts: Cuts | None, skip: int = 0) -> Iterator[Piece]:
    """The pieces of a text, from character `skip` on, where an earlier piece ended.

    Where a piece ends depends on the text after its beginning alone, so that the same pieces come again.

    Arguments:
        read: the next characters, as many as are asked for, fewer at the end of the text.
        cuts: None: the text is one piece.
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
    """A function that reads a string that is there already."""
    at = 0

    def read(count: int) -> str:
        nonlocal at
        at += count
        return text[at - count : at]

    return read


def _places(tokenizer: Any) -> list[str]:
    """Patterns of what stands before a cut, with what must follow; none where nothing is known for sure."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    try:
        normalizers, splitters = (_types(getattr(inner, part)) for part in ("normalizer", "pre_tokenizer"))
        model = type(inner.model).__name__ if inner is not None else ""
        dropout = getattr(inner.model, "dropout", None) if inner is not None else None
    except Exception:  # parts written in Python cannot be looked into, and say so with many kinds of errors
        return []
    if not set(normalizers) <= _NORMALIZERS or not set(splitters) <= _SPLITTERS or dropout:
        return []
    if model != "BPE" and not (model in ("Unigram", "WordPiece", "WordLevel") and _splits_words(splitters)):
        return []
    # As the vocabulary writes them: byte-level tokenizers have a character per byte, SentencePiece has ▁ for a space.
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
    """The types of which a normalizer or pre-tokenizer is made, with their settings."""
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
