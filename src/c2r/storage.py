"""Folders and files that c2r writes: whole or not at all, marked as its own, and held while they are written.

A folder that c2r writes in (a run's, a cache's) has a file `.c2r`. It is the mark that the folder is c2r's; its lines
list what c2r wrote there, as patterns, and only that is ever removed; and it is what processes lock. A lock is the
system's own (flock), so that it ends with the process that holds it, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

MARK = ".c2r"
LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|old)")
"""Temporary names used while writing and deleting. Anything left with such a name after a crash is garbage."""
_FIRST = "# c2r {kind}. What is listed here was written by c2r, and only that is ever removed by it.\n"


class Busy(ValueError):
    """Another process holds the folder; `readers` if it only reads there."""

    def __init__(self, message: str, *, readers: bool) -> None:
        super().__init__(message)
        self.readers = readers


# Files


def write_text(path: Path, text: str, field: str) -> None:
    """Write a small file, whole or not at all.

    Raises:
        ValueError: it cannot be written; names the field, the file, the bytes it needs and those that are free.
    """
    partial, data = hidden(path, "partial"), text.encode()
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{field}: {cannot_write(path, len(data), error)}") from error


def cannot_write(path: Path, size: int, error: Exception) -> str:
    """What a user needs to know when the disk refuses."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return f"cannot write {path} ({size:,} bytes; {free:,} free on that disk): {error}"


def check_writable(folder: Path, field: str) -> None:
    """Find out before any work that nothing can be written in a folder, which may not exist yet and is not made.

    Raises:
        ValueError: a file is in the way, or the system refuses; names the field.
    """
    at = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not at.is_dir():
        raise ValueError(f"{field}: cannot write in {folder}: {at} is not a folder")
    probe = hidden(at / "probe", "partial")
    try:
        try:
            probe.write_bytes(b"c2r")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{field}: cannot write in {folder}: {error.strerror}") from error


def hidden(path: Path, kind: str) -> Path:
    """A name beside `path` for what is not finished (`partial`) or about to be deleted (`old`)."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}"


def discard(folder: Path) -> None:
    """Remove a folder so that it is never seen half removed."""
    old = hidden(folder, "old")
    folder.rename(old)
    old.unlink() if old.is_symlink() else shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what a killed process left unfinished in a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Ownership


def marked(folder: Path, kind: str) -> bool:
    """Whether the folder has c2r's mark for folders of a kind ("run", "cache")."""
    try:
        with (folder / MARK).open(encoding="utf-8") as file:
            return file.readline() == _FIRST.format(kind=kind)
    except (OSError, ValueError):
        return False


def strangers(folder: Path, kind: str) -> list[str]:
    """What lies in a folder that c2r has not marked as this kind; empty for a marked one, or one that c2r may take."""
    if marked(folder, kind):
        return []
    begun, first = folder / MARK, _FIRST.format(kind=kind).encode()  # made, and its first line was not finished
    ours = begun.is_file() and begun.stat().st_size < len(first) and first.startswith(begun.read_bytes())
    return sorted(
        path.name
        for path in folder.iterdir()
        if not LEFT_OVER.fullmatch(path.name) and not (ours and path.name == MARK)
    )


def recorded(folder: Path, kind: str) -> list[str]:
    """The patterns of what c2r wrote in a marked folder; a last line that was cut short does not count."""
    if not marked(folder, kind):
        return []
    lines = (folder / MARK).read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]


def record(folder: Path, kind: str, patterns: Iterable[str], field: str) -> None:
    """Add to what c2r wrote in a folder, and mark the folder if it is not; to be called before it is written.

    A pattern is a path from the folder on, `/` between its names, `*` within a name; `**` at its end is all below.

    Raises:
        ValueError: the mark cannot be written.
    """
    there, known = marked(folder, kind), recorded(folder, kind)
    text = "".join(f"{pattern}\n" for pattern in dict.fromkeys(patterns) if pattern not in known)
    text = text if there else _FIRST.format(kind=kind) + text
    if not text:
        return
    try:
        if there and not (folder / MARK).read_bytes().endswith(b"\n"):
            text = "\n" + text  # ends a line that was cut short
        with (folder / MARK).open("ab" if there else "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{field}: {cannot_write(folder / MARK, len(text.encode()), error)}") from error


def in_the_way(folder: Path, kind: str, patterns: Iterable[str]) -> list[str]:
    """What stands in a marked folder under names that c2r is about to use, and was not written by c2r."""
    ours = [PurePosixPath(pattern).parts[0] for pattern in recorded(folder, kind)]
    wanted = dict.fromkeys(PurePosixPath(pattern).parts[0] for pattern in patterns)
    return [name for name in wanted if os.path.lexists(folder / name) and name not in ours]


def remove_recorded(folder: Path, kind: str, more: Sequence[str] = ()) -> list[str]:
    """Remove what c2r wrote in a marked folder (and `more`), and forget the record; return the names that are left.

    Links are removed and never followed; a folder goes when nothing is left in it.
    """
    _clear(folder, [PurePosixPath(pattern).parts for pattern in (*recorded(folder, kind), *more)])
    with (folder / MARK).open("r+b") as file:
        file.truncate(len(_FIRST.format(kind=kind).encode()))
    return sorted(path.name for path in folder.iterdir() if path.name != MARK)


def _clear(folder: Path, patterns: list[tuple[str, ...]]) -> None:
    for path in sorted(folder.iterdir()):
        rest = [pattern if pattern[0] == "**" else pattern[1:] for pattern in patterns if _names(pattern, path.name)]
        garbage = bool(LEFT_OVER.fullmatch(path.name))
        if path.is_symlink() or not path.is_dir():
            if garbage or (rest and path.is_symlink()) or any(not left or left[0] == "**" for left in rest):
                path.unlink()
        elif garbage:
            shutil.rmtree(path)
        elif rest:
            _clear(path, [left for left in rest if left])
            if not any(path.iterdir()):
                path.rmdir()


def _names(pattern: tuple[str, ...], name: str) -> bool:
    return pattern[0] == "**" or fnmatchcase(name, pattern[0])


# Locks


@contextlib.contextmanager
def held(folder: Path, kind: str, field: str, doing: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Make the folder, mark it, and hold it while entered, so that no two processes (or threads) write in it.

    Arguments:
        kind: "run" or "cache".
        field: of the configuration, for errors.
        doing: what is done in it, for the other process's error: "training in".
        say: is told where the file system has no locks.

    Raises:
        Busy: another holds it, or reads there.
        ValueError: the folder cannot be made or written in, or holds something that is not c2r's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{field}: cannot make the folder {folder}: {error.strerror}") from error
    try:
        foreign = strangers(folder, kind)
        if foreign:
            raise ValueError(
                f"{field}: {folder} holds something else ({', '.join(foreign[:5])}); give a new or empty folder"
            )
        handle = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"{field}: cannot write in {folder}: {error.strerror}") from error
    try:
        if not _locked(handle, shared=False, say=say):
            readers = _locked(handle, shared=True)
            how = "reading" if readers else doing
            raise Busy(f"{field}: another process is {how} {folder}; wait until it is done", readers=readers)
        record(folder, kind, (), field)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def read_held(folder: Path, field: str) -> Iterator[None]:
    """While entered, no process writes in the folder; any number may read. A folder without the mark is not held.

    Raises:
        Busy: another writes there.
    """
    try:
        handle = os.open(folder / MARK, os.O_RDONLY)
    except OSError:  # what reads the folder says what is wrong with it
        yield
        return
    try:
        if not _locked(handle, shared=True):
            raise Busy(f"{field}: another process is writing in {folder}; wait until it is done", readers=False)
        yield
    finally:
        os.close(handle)


def _locked(handle: int, *, shared: bool, say: Callable[[str], None] | None = None) -> bool:
    """Whether the lock was free; it is now held until the file is closed. True where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        if say is not None:
            say(f"no lock can be had here ({error}): see to it that no other process writes in the same folder")
    return True
