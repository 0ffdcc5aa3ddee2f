"""Local files of documents, read from any position on: text, JSON lines (compressed or not) and Parquet."""

from __future__ import annotations

import glob
import gzip
import json
import random
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from c2r.data.document import Document, Read, as_document, fields_of
from c2r.data_config import TextSource
from c2r.identity import of_files

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_ACCEPTED = f"{', '.join(ENDINGS[:-1])} and {ENDINGS[-1]}"


def file_paths(pattern: str, section: str = "data") -> list[Path]:
    """The files that a path, a folder (files with other endings are passed over) or a glob names, sorted.

    Raises:
        ValueError: nothing matches, or a file has an ending that is not read.
    """
    given = Path(pattern)
    if given.is_dir():
        found = [path for path in given.rglob("*") if _ending(path) and path.is_file()]
    else:
        found = [Path(path) for path in glob.glob(pattern, recursive=True)]
    if not found:
        raise ValueError(f"{section}.path: no file matches {pattern!r}; give {_ACCEPTED} files, a folder or a glob")
    for path in found:
        if not _ending(path):
            raise ValueError(f"{section}.path: {path} ends in {path.suffix!r}; accepted are {_ACCEPTED}")
    return sorted(found)


class FileReader:
    """Documents of local files: a `.txt` file is one, other files hold one a line or row.

    The seed shuffles the files; within a file, documents come in their order.

    Raises:
        ValueError: see `file_paths`; or text files where the source is to have fields.
    """

    def __init__(self, section: str, source: TextSource) -> None:
        self.section, self.source = section, source
        self.paths = file_paths(source.path or "", section)
        plain = next((path for path in self.paths if path.suffix == ".txt"), None)
        if plain is not None and (source.chat_field or source.tokens_field):
            raise ValueError(f"{section}.path: {plain} is plain text; fields need .jsonl or .parquet")

    @property
    def identity(self) -> str:
        """The files' contents in their order; see `of_files` for what is read of very large ones.

        Raises:
            ValueError: a file cannot be read.
        """
        try:
            return of_files(self.paths)
        except ValueError as error:
            raise ValueError(f"{self.section}.path: {error}") from error

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`; a position is the file's number, lines or rows read of it, and bytes of those lines."""
        paths = list(self.paths)
        random.Random(seed).shuffle(paths)
        first, done, byte = start or (0, 0, 0)
        for number, path in enumerate(paths[first:], first):
            if path.suffix == ".txt":
                if not done and (text := _text(path, self.section)).strip():
                    yield Document("text", text, None, f"{self.section}.path: {path}"), partial(list, (number, 1, 0))
            elif path.suffix == ".parquet":
                for row, record in parquet_records(path, fields_of(self.source), done, self.section):
                    document = as_document(record, f"{path}, row {row}", self.section, self.source)
                    if document is not None:
                        yield document, partial(list, (number, row + 1, 0))
            else:
                for line, end, record in _records(path, done, byte, self.section):
                    document = as_document(record, f"{path}:{line}", self.section, self.source)
                    if document is not None:
                        yield document, partial(list, (number, line, end))
            done = byte = 0


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a `.jsonl` file, each with where it stands (`file:line`).

    Raises:
        ValueError: a line is not a JSON object, or the file cannot be read.
    """
    return ((f"{path}:{line}", record) for line, _, record in _records(path))


def parquet_records(
    path: Path, columns: list[str], start: int = 0, section: str = "data"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from number `start` on, each with its number; row groups before it are not read.

    Raises:
        ValueError: the file is damaged or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise _MissingColumn(f"{path} has no column {column!r}; it has: {', '.join(names)}")
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= start:
                    row += size
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    skipped = min(max(start - row, 0), len(batch))
                    yield from enumerate(batch.slice(skipped).to_pylist(), row + skipped)
                    row += len(batch)
    except _MissingColumn as error:
        raise ValueError(f"{section}: {error}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{section}.path: {path} cannot be read from row {row} on: {error}") from error


class _MissingColumn(Exception):
    pass


def _records(
    path: Path, done: int = 0, byte: int = 0, section: str = "data"
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Objects after the first `done` lines, which are `byte` bytes: line number, bytes up to its end, object."""
    for line, end, text in _lines(path, done, byte, section):
        if not text.strip():
            continue
        try:
            record: Any = json.loads(text.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{section}.path: {path}:{line} is not UTF-8 ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{section}.path: {path}:{line} is not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{section}.path: {path}:{line} is not an object but {type(record).__name__}")
        yield line, end, record


def _lines(path: Path, line: int, byte: int, section: str) -> Iterator[tuple[int, int, bytes]]:
    zstd = zstd_module() if path.suffix == ".zst" else None
    opened: Any = zstd.open if zstd else gzip.open if path.suffix == ".gz" else open
    broken = (OSError, EOFError, zlib.error) + ((zstd.ZstdError,) if zstd else ())
    try:
        with opened(path, "rb") as file:
            file.seek(byte)
            for text in file:
                line, byte = line + 1, byte + len(text)
                yield line, byte, text
    except broken as error:
        raise ValueError(f"{section}.path: {path} cannot be read after line {line}: {error}") from error


def zstd_module() -> Any:
    """The standard library's, or before Python 3.14 its backport."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _text(path: Path, section: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{section}.path: {path} cannot be read: {error}") from error


def _ending(path: Path) -> bool:
    return path.name.endswith(ENDINGS)
