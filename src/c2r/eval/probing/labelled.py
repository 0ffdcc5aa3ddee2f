"""Labelled texts for probing: from a .jsonl file, a Hugging Face data set, or Python's standard library.

Texts of the standard library need no download and no annotation: Python's own parser labels them. They come from files
that neither the embedded model nor SAEs of c2r were trained on.
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
"""Largest and smallest number of texts per label, largest number of labels, and number of records read."""
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
    """A labelled data set."""

    name: str
    texts: dict[str, list[str]]
    """Distinct texts by label, in an order fixed by the seed."""
    left_out: dict[str, int]
    """Number of texts of each label that was left out: it has too few, or is not among the ten most frequent."""


def labelled_texts(where: str, seed: int = 0) -> LabelledTexts:
    """Texts of a `.jsonl` file (or a glob of them) or of the split `train` of a Hugging Face data set.

    Records have the fields `text`, and `label`, a string or an integer; the first 50,000 records are read.

    Raises:
        ValueError: no record is found, a record lacks one of the fields, or fewer than two labels have enough texts.
    """
    try:
        pairs = [(record["label"], record["text"]) for record in itertools.islice(_records(where, seed), READ)]
        return _by_label(Path(where).stem if where.endswith(".jsonl") else where, pairs, seed)
    except ValueError as error:
        raise ValueError(f"probe_data: {str(error).removeprefix('data.path: ')}") from error


def check_labelled(where: str) -> None:
    """Check the source's first record, before a model is loaded.

    Raises:
        ValueError: see `labelled_texts`.
    """
    try:
        if next(_records(where, 0), None) is None:
            raise ValueError(f"{where} contains no record")
    except ValueError as error:
        raise ValueError(f"probe_data: {str(error).removeprefix('data.path: ')}") from error


def stdlib_tasks(seed: int = 0) -> list[LabelledTexts]:
    """Three data sets made from held-out files of the standard library.

    `stdlib_module`: three consecutive lines, labelled by their module, from the six largest modules (character set
    tables excluded). `stdlib_statement`: the first two lines of a statement, labelled by its kind. `stdlib_region`: a
    line of a comment or docstring (without its marks, at least three words) or of code, labelled by which it is.
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
                f"{place}: expected 'text', a string, and 'label', a string or an integer; got {record!s:.200}"
            )
        if (fault := surrogate_in(text)) is not None:
            raise ValueError(f"{place}: 'text' contains {fault}")
        if text.strip():
            yield {"text": text, "label": str(label)}


def _raw_records(where: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if not where.endswith(".jsonl"):
        yield from ((where, record) for record in hf_records(where, "train", seed=seed))
        return
    paths = matching(where)
    if not paths:
        raise ValueError(f"no file matches {where!r}; expected a .jsonl file or the id of a data set")
    for path in paths:
        yield from jsonl_records(path)


def _by_label(name: str, pairs: Iterable[tuple[str, str]], seed: int) -> LabelledTexts:
    """Distinct texts by label, shuffled; a text with several labels gets only the first one."""
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
        raise ValueError(f"{name}: needs at least two labels with at least {LEAST} distinct texts each; got {counts}")
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
    lines = text.split("\n")  # as the parser counts lines
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
