"""Resolve a path, a folder or a glob to files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_ACCEPTED = f"{', '.join(ENDINGS[:-1])} and {ENDINGS[-1]}"


def file_paths(pattern: str, section: str = "data") -> list[Path]:
    """The files given by a path, a folder (files with other endings are skipped) or a glob, sorted.

    Raises:
        ValueError: nothing matches, a file has an unsupported ending, or a file or folder cannot be read.
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
            raise ValueError(f"{section}.path: {path} is a broken symbolic link; give an existing file")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{section}.path: {path} cannot be read: permission denied")
    return sorted(found)


def matching(pattern: str) -> list[Path]:
    """The file with exactly that name or, if there is none, the files matching the glob, sorted, without folders.

    Leading folders of the pattern that exist are taken literally, whatever characters they contain. `[` is taken
    literally if the pattern matches nothing with it as a character set.
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
    """The path with a leading `~` replaced by the home folder, unless a file or folder has exactly the given name."""
    path = Path(pattern)
    if pattern.startswith("~") and not path.exists():
        try:
            return path.expanduser()
        except RuntimeError:  # no such user
            return path
    return path


def ending(path: Path) -> str | None:
    """The file's ending in lower case if it is an accepted one, else None."""
    return next((end for end in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(end)), None)


def _walk(folder: Path, section: str) -> Iterator[Path]:
    """All files below a folder, following links; each folder is visited once."""

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
