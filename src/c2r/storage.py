"""Atomic writing of files and folders, ownership of folders, and locks.

Each output folder (of a run or a cache) contains a file `.c2r`, which marks the folder as c2r's. Its lines list, as
patterns, what c2r wrote there; c2r never deletes anything else. Processes also lock this file, with the operating
system's flock, which is released whenever the process ends.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

MARK = ".c2r"
LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|old)")
"""Temporary names used while writing and deleting. Anything left with such a name after a crash is garbage."""
_FIRST = "# c2r {kind}. What is listed here was written by c2r, and only that is ever removed by it.\n"


class Busy(ValueError):
    """Another process has locked the folder; `readers`: only for reading."""

    def __init__(self, message: str, *, readers: bool) -> None:
        super().__init__(message)
        self.readers = readers


# Files


@contextmanager
def whole(path: Path, others: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Write a file or folder completely or not at all: yields a temporary path that becomes `path` at the end.

    Everything is flushed to disk before the rename. If the block fails, whatever stood at `path` stays as it was.

    Arguments:
        others: for folders that may hold other people's files: the names that are moved from the folder that is
            replaced into the new one. None: nothing is moved.

    Raises:
        OSError: whatever the block, flushing or renaming raises.
    """
    partial = hidden(path, "partial")
    try:
        yield partial
        for written in (*(partial.iterdir() if partial.is_dir() else ()), partial):
            sync(written)
        if partial.is_dir():
            _take_the_place(partial, path, others)
            sync(path.parent)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def _take_the_place(partial: Path, folder: Path, others: Callable[[str], bool] | None) -> None:
    """Rename a finished folder to `folder`; an older one is deleted only afterwards."""
    old = None
    if os.path.lexists(folder):
        old = hidden(folder, "old")
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    if old is not None:
        for path in old.iterdir() if others is not None and old.is_dir() else ():
            if others is not None and others(path.name):
                path.rename(folder / path.name)
        old.unlink() if old.is_symlink() or not old.is_dir() else shutil.rmtree(old)


def write_text(path: Path, text: str, field: str) -> None:
    """Write a small file atomically.

    Raises:
        ValueError: the file cannot be written; names the field, the file, the bytes needed and the bytes free.
    """
    data = text.encode()
    try:
        with whole(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise ValueError(f"{field}: {cannot_write(path, len(data), error)}") from error


def cannot_write(path: Path, size: int, error: Exception) -> str:
    """Message for a failed write: path, size, free space and the error."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return f"cannot write {path} ({size:,} bytes; {free:,} free on that disk): {error}"


def check_writable(folder: Path, field: str) -> None:
    """Check before any work that a folder can be written to. It need not exist and is not created.

    Raises:
        ValueError: a file is in the way, or writing is not permitted; names the field.
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
    """Temporary name next to `path`, for something unfinished (`partial`) or about to be deleted (`old`)."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}"


def discard(folder: Path) -> None:
    """Delete a folder, renaming it first so that it is never seen partially deleted."""
    old = hidden(folder, "old")
    folder.rename(old)
    old.unlink() if old.is_symlink() else shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Delete the temporary files and folders that a crashed process left in a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder's directory entries to disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Ownership


def marked(folder: Path, kind: str) -> bool:
    """Whether the folder has c2r's mark for this kind of folder ("run" or "cache")."""
    try:
        with (folder / MARK).open(encoding="utf-8") as file:
            return file.readline() == _FIRST.format(kind=kind)
    except (OSError, ValueError):
        return False


def strangers(folder: Path, kind: str) -> list[str]:
    """Names in a folder without c2r's mark of this kind; empty if c2r may use the folder."""
    if marked(folder, kind):
        return []
    begun, first = folder / MARK, _FIRST.format(kind=kind).encode()  # may be truncated after a crash
    ours = begun.is_file() and begun.stat().st_size < len(first) and first.startswith(begun.read_bytes())
    return sorted(
        path.name
        for path in folder.iterdir()
        if not LEFT_OVER.fullmatch(path.name) and not (ours and path.name == MARK)
    )


def recorded(folder: Path, kind: str) -> list[str]:
    """Patterns of what c2r wrote in a marked folder. A truncated last line is ignored."""
    if not marked(folder, kind):
        return []
    lines = (folder / MARK).read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]


def record(folder: Path, kind: str, patterns: Iterable[str], field: str) -> None:
    """Record patterns of files that c2r is about to write, and mark the folder if necessary.

    A pattern is a path relative to the folder, separated by `/`. `*` matches within a name; a final `**` matches
    everything below.

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
            text = "\n" + text  # ends a truncated line
        with (folder / MARK).open("ab" if there else "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{field}: {cannot_write(folder / MARK, len(text.encode()), error)}") from error


def in_the_way(folder: Path, kind: str, patterns: Iterable[str]) -> list[str]:
    """Files in a marked folder that c2r did not write but whose names it needs."""
    ours = [PurePosixPath(pattern).parts[0] for pattern in recorded(folder, kind)]
    wanted = dict.fromkeys(PurePosixPath(pattern).parts[0] for pattern in patterns)
    return [name for name in wanted if os.path.lexists(folder / name) and name not in ours]


def remove_recorded(folder: Path, kind: str, more: Sequence[str] = ()) -> list[str]:
    """Delete what c2r wrote in a marked folder, and `more`, and clear the record; return the remaining names.

    Symbolic links are deleted, not followed. Folders are deleted once they are empty.
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


@contextmanager
def held(folder: Path, kind: str, field: str, doing: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Create the folder, mark it, and lock it while entered, so that no two processes or threads write to it.

    Arguments:
        kind: "run" or "cache".
        field: field of the configuration, for error messages.
        doing: activity shown in another process's error, such as "training in".
        say: called with a warning if the file system does not support locks.

    Raises:
        Busy: another process has locked the folder.
        ValueError: the folder cannot be created or written to, or contains files that c2r did not write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{field}: cannot create the folder {folder}: {error.strerror}") from error
    try:
        foreign = strangers(folder, kind)
        if foreign:
            raise ValueError(
                f"{field}: {folder} contains files that c2r did not write ({', '.join(foreign[:5])}); choose a new or "
                "empty folder"
            )
        handle = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"{field}: cannot write in {folder}: {error.strerror}") from error
    try:
        if not _locked(handle, shared=False, say=say):
            readers = _locked(handle, shared=True)
            how = "reading" if readers else doing
            raise Busy(f"{field}: another process is {how} {folder}; wait until it has finished", readers=readers)
        record(folder, kind, (), field)
        yield
    finally:
        os.close(handle)


@contextmanager
def read_held(folder: Path, field: str) -> Iterator[None]:
    """Lock the folder against writing while entered; other processes may read. Unmarked folders are not locked.

    Raises:
        Busy: another process is writing to the folder.
    """
    try:
        handle = os.open(folder / MARK, os.O_RDONLY)
    except OSError:  # no folder or mark: reading it will raise a specific error
        yield
        return
    try:
        if not _locked(handle, shared=True):
            raise Busy(f"{field}: another process is writing to {folder}; wait until it has finished", readers=False)
        yield
    finally:
        os.close(handle)


def _locked(handle: int, *, shared: bool, say: Callable[[str], None] | None = None) -> bool:
    """Acquire the lock until the file is closed; return whether it was free. Without lock support, return True."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        if say is not None:
            say(f"cannot lock the folder ({error}): make sure that no other process writes to it")
    return True
