"""Which files a path, a folder or a glob names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_ACCEPTED = f"{', '.join(ENDINGS[:-1])} and {ENDINGS[-1]}"


def file_paths(pattern: str, section: str = "data") -> list[Path]:
    """The files that a path, a folder (files with other endings are skipped) or a glob names, sorted.

    Raises:
        ValueError: nothing matches, a file has an ending that is not read, or it or a folder cannot be read.
    """
    given = expanded(pattern)
    if given.is_dir():
        found = [path for path in _walk(given, section) if ending(path)]
    else:
        found = matching(pattern)
    if not found:
        raise ValueError(f"{section}.path: no file matches {pattern!r}; give {_ACCEPTED} files, a folder or a glob")
    for path in found:
        if not ending(path):
            raise ValueError(f"{section}.path: {path} ends in {path.suffix!r}; accepted are {_ACCEPTED}")
        if not path.exists():
            raise ValueError(f"{section}.path: {path} is a link to something that is not there")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{section}.path: {path} cannot be read: permission denied")
    return sorted(found)


def matching(pattern: str) -> list[Path]:
    """The file of that very name, or else the files that a glob names, sorted; folders are left out.

    Folders of the pattern that exist are taken by their names, whatever signs these have; `[` stands for itself where
    it matches nothing as a set of characters.
    """
    given = expanded(pattern)
    if given.exists() or given.is_symlink():
        return [given]
    known, parts = Path(given.anchor), list(given.parts[1:] if given.anchor else given.parts)
    while parts and (known / parts[0]).exists():
        known /= parts.pop(0)
    rest = os.path.join(*parts) if parts else ""
    for text in dict.fromkeys((rest, rest.replace("[", "[[]"))):
        whole = os.path.join(glob.escape(str(known)), text) if known.parts else text
        found = [path for path in map(Path, glob.glob(whole, recursive=True)) if not path.is_dir()]
        if found:
            return sorted(found)
    return []


def expanded(pattern: str) -> Path:
    """The path, `~` at its beginning replaced by the home folder, except where something has that very name."""
    path = Path(pattern)
    if pattern.startswith("~") and not path.exists():
        try:
            return path.expanduser()
        except RuntimeError:  # nobody of that name
            return path
    return path


def ending(path: Path) -> str | None:
    """Which of the accepted endings a file has, in lower case."""
    return next((end for end in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(end)), None)


def _walk(folder: Path, section: str) -> Iterator[Path]:
    """Files below a folder, through links too, each folder once."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{section}.path: {error.filename} cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place) / name for name in names)
