"""Text that needs no download: the source code of Python's standard library."""

from __future__ import annotations

import random
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

# Not part of the corpus: tests and vendored wheels, which many installations lack.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


def stdlib_files() -> list[Path]:
    """The `.py` files of the running Python's standard library without its tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _python_files(root)
    if not found:
        raise ValueError(f"data.source: 'stdlib' found no Python source code under {root}; use source 'files' or 'hf'")
    return list(found)


@cache  # the search walks through all installed packages, which takes a second
def _python_files(root: Path) -> list[Path]:
    found = [p for p in root.rglob("*.py") if not _SKIPPED.intersection(p.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(seed: int = 0, held_out: bool | None = None) -> Iterator[str]:
    """Source code of the standard library, one document per non-empty file; see `stdlib_sources`."""
    return (text for _, text in stdlib_sources(seed, held_out) if text.strip())


def stdlib_sources(seed: int = 0, held_out: bool | None = None, start: int = 0) -> Iterator[tuple[str, str]]:
    """Name (`email/parser.py`) and text of the standard library's files, shuffled by `seed`, starting at file `start`.

    `held_out` selects the files that the embedded model was never trained on (true), the rest (false), or all (None).
    The held-out names, one in twenty, ship with the package, so that every Python version holds out the same files.

    Raises:
        ValueError: a file cannot be read.
    """
    root, paths = Path(sysconfig.get_paths()["stdlib"]), stdlib_part(held_out)
    random.Random(seed).shuffle(paths)
    for path in paths[start:]:
        yield path.relative_to(root).as_posix(), _source(path)


def _source(path: Path) -> str:
    """Text of a Python file in the encoding that it declares (PEP 263), or UTF-8.

    Raises:
        ValueError: the file is not in that encoding, or cannot be read.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"data.source: 'stdlib' cannot read {path}: {error}") from error


def stdlib_part(held_out: bool | None) -> list[Path]:
    """The held-out files of `stdlib_files` (true), the rest (false), or all (None), in the same order."""
    root, paths = Path(sysconfig.get_paths()["stdlib"]), stdlib_files()
    if held_out is None:
        return paths
    names = set((files("c2r") / "assets" / "held_out.txt").read_text(encoding="utf-8").split())
    return [path for path in paths if (path.relative_to(root).as_posix() in names) == held_out]
