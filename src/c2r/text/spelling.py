"""Spelling lists of the words in a tokenizer's vocabulary: text that teaches a model the first letter of each word."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

PAIRS_PER_LIST = 40


def alphabetic_tokens(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Text and id of vocabulary entries made only of A-Z and a-z, with at most one leading space."""
    for piece, index in tokenizer.get_vocab().items():
        text = tokenizer.decode([index])
        if piece[:1] == "▁" and text[:1] != " ":  # some decoders strip a space at the beginning of the text
            text = " " + text
        word = text.removeprefix(" ")
        if word.isascii() and word.isalpha():
            yield text, index


def vocabulary_words(tokenizer: Any) -> list[str]:
    """Words that are a single token after a space: only A-Z and a-z, at least two letters, sorted."""
    return sorted({text[1:] for text, _ in alphabetic_tokens(tokenizer) if text[0] == " " and len(text) > 2})


def spelling_documents(words: Sequence[str], seed: int = 0) -> Iterator[str]:
    r"""Endless lists of entries `"\n word W"`: a word and its first letter in upper case.

    Every fifth list spells its words out instead (`"\n word : w o r d"`). Mixed into the training text,
    they make the model compute a word's first letter at the word's own token.
    """
    return (text for text, _ in spelling_lists(words, seed))


def spelling_lists(words: Sequence[str], seed: int = 0, start: Any = None) -> Iterator[tuple[str, list[Any]]]:
    """The lists of `spelling_documents`, starting at a position, each with the position after it.

    A position is JSON-serializable: the generator's state before the last shuffle of the words, the number of lists
    before that shuffle, and the number since.
    """
    rng = random.Random(seed)
    before = served = 0
    if start is not None:
        state, before, served = start
        rng.setstate((3, tuple(state), None))
    while True:
        state = list(rng.getstate()[1])
        deck = list(words)
        rng.shuffle(deck)
        parts = range(0, len(deck), PAIRS_PER_LIST)
        for place, first in enumerate(parts[served:], served + 1):
            part = deck[first : first + PAIRS_PER_LIST]
            if (before + place) % 5 == 0:
                text = "".join(f"\n {word} : {' '.join(word.lower())}" for word in part[: PAIRS_PER_LIST // 3])
            else:
                text = "".join(f"\n {word} {word[0].upper()}" for word in part)
            yield text, [state, before, place]
        before, served = before + len(parts), 0
