"""Text that needs no download: the standard library, and spelling lists of a tokenizer's own words."""

from __future__ import annotations

import random
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

# Left out of the standard-library corpus: tests and vendored wheels are absent from many installations.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
PAIRS_PER_LIST = 40


def stdlib_files() -> list[Path]:
    """The `.py` files of the running Python's standard library, tests left out, sorted by their path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _python_files(root)
    if not found:
        raise ValueError(f"data.source: 'stdlib' found no Python source under {root}; use source 'files' or 'hf'")
    return list(found)


@cache  # the search passes through all that is installed, which takes a second
def _python_files(root: Path) -> list[Path]:
    found = [p for p in root.rglob("*.py") if not _SKIPPED.intersection(p.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(seed: int = 0, held_out: bool | None = None) -> Iterator[str]:
    """The standard library's source, a file a document, empty ones left out; see `stdlib_sources`."""
    return (text for _, text in stdlib_sources(seed, held_out) if text.strip())


def stdlib_sources(seed: int = 0, held_out: bool | None = None, start: int = 0) -> Iterator[tuple[str, str]]:
    """Name (`email/parser.py`) and text of the standard library's files, shuffled by `seed`, from file `start` on.

    `held_out` picks the files that the embedded model never trained on (a list of names that ships with the package,
    one in twenty, so that another Python version holds out the same ones), the rest, or, when None, all.

    Raises:
        ValueError: a file cannot be read.
    """
    root, paths = Path(sysconfig.get_paths()["stdlib"]), stdlib_part(held_out)
    random.Random(seed).shuffle(paths)
    for path in paths[start:]:
        yield path.relative_to(root).as_posix(), _source(path)


def _source(path: Path) -> str:
    """A Python file's text in the encoding that it declares (PEP 263), or UTF-8.

    Raises:
        ValueError: it is not in that encoding, or cannot be read.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"data.source: 'stdlib' cannot read {path}: {error}") from error


def stdlib_part(held_out: bool | None) -> list[Path]:
    """The files of `stdlib_files` that are held out, the rest, or all (None), in the same order."""
    root, paths = Path(sysconfig.get_paths()["stdlib"]), stdlib_files()
    if held_out is None:
        return paths
    names = set((files("c2r") / "assets" / "held_out.txt").read_text(encoding="utf-8").split())
    return [path for path in paths if (path.relative_to(root).as_posix() in names) == held_out]


def alphabetic_tokens(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Vocabulary entries that are A-Z and a-z alone, with one leading space or none: their text and id."""
    for piece, index in tokenizer.get_vocab().items():
        text = tokenizer.decode([index])
        if piece[:1] == "▁" and text[:1] != " ":  # some decoders strip the space of what they take for a beginning
            text = " " + text
        word = text.removeprefix(" ")
        if word.isascii() and word.isalpha():
            yield text, index


def vocabulary_words(tokenizer: Any) -> list[str]:
    """Words that are one token when written after a space: A-Z and a-z alone, at least two letters, sorted."""
    return sorted({text[1:] for text, _ in alphabetic_tokens(tokenizer) if text[0] == " " and len(text) > 2})


def spelling_documents(words: Sequence[str], seed: int = 0) -> Iterator[str]:
    r"""Without end: lists of `"\n word W"`, the word and its first letter in upper case.

    Every fifth list spells its words out instead (`"\n word : w o r d"`). Embedded in the training text,
    they make a word's first letter something that the model computes at the word's own token.
    """
    return (text for text, _ in spelling_lists(words, seed))


def spelling_lists(words: Sequence[str], seed: int = 0, start: Any = None) -> Iterator[tuple[str, list[Any]]]:
    """The lists of `spelling_documents` from a position on, each with the position after it.

    A position, of JSON's values, is the generator's state before the words were shuffled last, how many lists there
    were until then, and how many since.
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
