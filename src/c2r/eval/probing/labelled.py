"""Labelled texts to probe on: from a .jsonl file, a Hugging Face data set, or Python's own standard library.

The library's texts are labelled by Python's own parser and come from files that neither the embedded model nor an SAE
of ours was trained on, so that they need no download and no annotator.
"""

from __future__ import annotations

import ast
import io
import itertools
import random
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from c2r.text.decoding import surrogate_in
from c2r.text.files import jsonl_records
from c2r.text.hub import hf_records
from c2r.text.paths import matching
from c2r.text.stdlib import stdlib_sources

MOST, LEAST, LABELS, READ = 500, 20, 10, 50_000
"""Texts a label at most and at least, labels at most, and records read to find them."""
_MODULES, _PASSAGE = 6, 3
_KINDS: dict[type[ast.stmt], str] = {
    ast.Assign: "assignment",
    ast.ClassDef: "class",
    ast.For: "for",
    ast.FunctionDef: "function",
    ast.If: "if",
    ast.Raise: "raise",
    ast.Return: "return",
    ast.Try: "try",
}


class LabelledTexts(NamedTuple):
    """A data set to probe on."""

    name: str
    texts: dict[str, list[str]]
    """Distinct texts by label, in an order fixed by the seed."""
    left_out: dict[str, int]
    """Labels without enough texts (or beyond the ten with most), and how many each had."""


def labelled_texts(where: str, seed: int = 0) -> LabelledTexts:
    """Texts of a `.jsonl` file (or a glob of them) or of a `datasets` data set (its split `train`).

    Records have `text` and `label`, a string or a whole number; the first 50,000 are read.

    Raises:
        ValueError: nothing there, a record without the two, or fewer than two labels with enough texts.
    """
    try:
        pairs = [(record["label"], record["text"]) for record in itertools.islice(_records(where, seed), READ)]
        return _by_label(Path(where).stem if where.endswith(".jsonl") else where, pairs, seed)
    except ValueError as error:
        raise ValueError(f"probe_data: {str(error).removeprefix('data.path: ')}") from error


def check_labelled(where: str) -> None:
    """Find what is wrong with the source's first record, before a model is loaded.

    Raises:
        ValueError: see `labelled_texts`.
    """
    try:
        if next(_records(where, 0), None) is None:
            raise ValueError(f"{where} holds no record")
    except ValueError as error:
        raise ValueError(f"probe_data: {str(error).removeprefix('data.path: ')}") from error


def stdlib_tasks(seed: int = 0) -> list[LabelledTexts]:
    """Three data sets of the standard library's held-out files.

    `stdlib_module`: three lines in a row of code or prose, by the module they are from, for the six with most of them
    (tables of character sets left out). `stdlib_statement`: the first two lines of a statement, by its kind.
    `stdlib_region`: a line of a comment, of a docstring (both without their marks, three words or more) or of code.
    """
    sources = {name: text for name, text in sorted(stdlib_sources(held_out=True)) if not name.startswith("encodings/")}
    passages = {name: list(_passages(text)) for name, text in sources.items()}
    largest = sorted(passages, key=lambda name: (-len(passages[name]), name))[:_MODULES]
    statements = [pair for text in sources.values() for pair in _statements(text)]
    code = [("code", text.splitlines()[0]) for _, text in statements]
    prose = [pair for text in sources.values() for pair in _prose(text)]
    return [
        _by_label("stdlib_module", ((name, passage) for name in largest for passage in passages[name]), seed),
        _by_label("stdlib_statement", statements, seed),
        _by_label("stdlib_region", prose + code, seed),
    ]


def _records(where: str, seed: int) -> Iterator[dict[str, str]]:
    """Records with a text and a label, both as strings."""
    for place, record in _raw_records(where, seed):
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, str) or not isinstance(label, str | int):
            raise ValueError(
                f"{place}: expected 'text', a string, and 'label', a string or a whole number; found {record!s:.200}"
            )
        if (fault := surrogate_in(text)) is not None:
            raise ValueError(f"{place}: 'text' holds {fault}")
        if text.strip():
            yield {"text": text, "label": str(label)}


def _raw_records(where: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if not where.endswith(".jsonl"):
        yield from ((where, record) for record in hf_records(where, "train", seed=seed))
        return
    paths = matching(where)
    if not paths:
        raise ValueError(f"no file matches {where!r}; give a .jsonl file or the id of a data set")
    for path in paths:
        yield from jsonl_records(path)


def _by_label(name: str, pairs: Iterable[tuple[str, str]], seed: int) -> LabelledTexts:
    """Distinct texts by label, shuffled; a text that has two labels counts for the first it came with."""
    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for label, text in pairs:
        if text.strip() not in seen:
            seen.add(text.strip())
            texts.setdefault(label, []).append(text)
    rng = random.Random(seed)
    for label in sorted(texts):
        rng.shuffle(texts[label])
    by_size = sorted(texts, key=lambda label: (-len(texts[label]), label))
    kept = sorted(label for label in by_size[:LABELS] if len(texts[label]) >= LEAST)
    if len(kept) < 2:
        counts = ", ".join(f"{label!r} {len(texts[label])}" for label in by_size[:LABELS]) or "none"
        raise ValueError(f"{name}: two labels with at least {LEAST} distinct texts are needed; it has {counts}")
    return LabelledTexts(
        name,
        {label: texts[label][:MOST] for label in kept},
        {label: len(texts[label]) for label in sorted(set(texts) - set(kept))},
    )


def _passages(text: str) -> Iterator[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    for start in range(0, len(lines) - _PASSAGE + 1, _PASSAGE):
        yield "\n".join(lines[start : start + _PASSAGE])


def _statements(text: str) -> Iterator[tuple[str, str]]:
    lines = text.split("\n")  # as the parser counts them
    for node in ast.walk(ast.parse(text)):
        kind = _KINDS.get(type(node)) if isinstance(node, ast.stmt) else None
        if isinstance(node, ast.stmt) and kind:
            last = min(node.lineno + 1, node.end_lineno or node.lineno)
            first_two = [line.encode() for line in lines[node.lineno - 1 : last]]  # columns count bytes
            if last == node.end_lineno:
                first_two[-1] = first_two[-1][: node.end_col_offset]
            first_two[0] = first_two[0][node.col_offset :]
            yield kind, b"\n".join(first_two).decode(errors="replace")


def _prose(text: str) -> Iterator[tuple[str, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line = token.string.strip("#! ")
            if len(line.split()) >= 3:
                yield "comment", line
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for line in (ast.get_docstring(node) or "").splitlines():
                if len(line.split()) >= 3:
                    yield "docstring", line.strip()
