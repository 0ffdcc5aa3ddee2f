"""Text: where documents come from. Every source yields whole documents, in an order fixed by the seed."""

from __future__ import annotations

import glob
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

# Left out of the standard-library corpus: tests and vendored wheels are absent from many installations.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
PAIRS_PER_LIST = 40


def stdlib_files() -> list[Path]:
    """The `.py` files of the running Python's standard library, tests left out, sorted by their path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in root.rglob("*.py") if not _SKIPPED.intersection(p.relative_to(root).parts)]
    if not found:
        raise ValueError(f"data.source: 'stdlib' found no Python source under {root}; use source 'files' or 'hf'")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(seed: int = 0, held_out: bool | None = None) -> Iterator[str]:
    """The standard library's source, a file a document; see `stdlib_sources`."""
    return (text for _, text in stdlib_sources(seed, held_out))


def stdlib_sources(seed: int = 0, held_out: bool | None = None) -> Iterator[tuple[str, str]]:
    """Name (`email/parser.py`) and text of the standard library's files, shuffled by `seed`, empty ones left out.

    `held_out` picks the files that the embedded model never trained on (a list of names that ships with the package,
    one in twenty, so that another Python version holds out the same ones), the rest, or, when None, all.
    """
    root, paths = Path(sysconfig.get_paths()["stdlib"]), stdlib_files()
    if held_out is not None:
        names = set((files("c2r") / "assets" / "held_out.txt").read_text(encoding="utf-8").split())
        paths = [path for path in paths if (path.relative_to(root).as_posix() in names) == held_out]
    random.Random(seed).shuffle(paths)
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def file_paths(pattern: str) -> list[Path]:
    """The `.txt` and `.jsonl` files that a path, a folder or a glob names, sorted.

    Raises:
        ValueError: nothing matches, or a file has another ending.
    """
    given = Path(pattern)
    if given.is_dir():
        found = [p for p in given.rglob("*") if p.suffix in (".txt", ".jsonl")]
    else:
        found = [Path(p) for p in glob.glob(pattern, recursive=True)]
    if not found:
        raise ValueError(f"data.path: no file matches {pattern!r}; give a .txt or .jsonl file, a folder or a glob")
    for path in found:
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"data.path: {path} ends in {path.suffix!r}; accepted are .txt and .jsonl")
    return sorted(found)


def file_documents(pattern: str, text_field: str = "text", seed: int = 0) -> Iterator[str]:
    """Documents of local files: a `.txt` file is one, a `.jsonl` file holds one a line under `text_field`.

    Raises:
        ValueError: see `file_paths`; or a line is not JSON or lacks the field.
    """
    paths = file_paths(pattern)
    random.Random(seed).shuffle(paths)
    for path in paths:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text
            continue
        for where, record in jsonl_records(path):
            if not isinstance(record.get(text_field), str):
                raise ValueError(
                    f"data.text_field: {where} has no text under {text_field!r}; it has: {', '.join(record)}"
                )
            if record[text_field].strip():
                yield record[text_field]


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a `.jsonl` file, each with where it stands (`file:line`).

    Raises:
        ValueError: a line is not a JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data.path: {path}:{number} is not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise ValueError(f"data.path: {path}:{number} is not an object but {type(record).__name__}")
            yield f"{path}:{number}", record


def hf_documents(path: str, split: str, text_field: str, name: str | None = None, seed: int = 0) -> Iterator[str]:
    """Documents of a `datasets` data set (a Hub id or a local folder), streamed, lightly shuffled.

    Raises:
        ValueError: the data set cannot be opened or has no such text field.
    """
    for record in hf_records(path, split, name, seed):
        if not isinstance(record.get(text_field), str):
            raise ValueError(f"data.text_field: records have no text under {text_field!r}; they have: {list(record)}")
        if record[text_field].strip():
            yield record[text_field]


def hf_records(path: str, split: str, name: str | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of a `datasets` data set, streamed, lightly shuffled.

    Raises:
        ValueError: the data set cannot be opened.
    """
    import datasets

    try:
        stream = datasets.load_dataset(path, name, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds; all of them mean that the configuration is off
        raise ValueError(f"data.path: cannot open data set {path!r}, split {split!r}: {error}") from error
    yield from stream.shuffle(seed=seed, buffer_size=1000)


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
    rng = random.Random(seed)
    number = 0
    while True:
        deck = list(words)
        rng.shuffle(deck)
        for start in range(0, len(deck), PAIRS_PER_LIST):
            part = deck[start : start + PAIRS_PER_LIST]
            number += 1
            if number % 5 == 0:
                yield "".join(f"\n {word} : {' '.join(word.lower())}" for word in part[: PAIRS_PER_LIST // 3])
            else:
                yield "".join(f"\n {word} {word[0].upper()}" for word in part)
