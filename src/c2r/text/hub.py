"""Data sets of the `datasets` library, streamed or local, from the Hub or a folder, read from any position."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from c2r.config.text import TextSource
from c2r.identity import of_files
from c2r.text.document import Read, as_document, fields_of
from c2r.text.paths import expanded

_BATCH = 64  # rows of a local data set fetched at once


class DataSetReader:
    """Documents of a `datasets` data set: a Hub id, a folder of data files, or a folder made by `save_to_disk`.

    For a streamed data set the seed shuffles the shards, and records keep their order within a shard. A local one
    (`streaming: false`) is shuffled completely.
    """

    def __init__(self, section: str, source: TextSource) -> None:
        self.section, self.source = section, source

    @cached_property
    def data(self) -> Any:
        """The data set.

        Raises:
            ValueError: the data set cannot be opened, or lacks a configured field.
        """
        source = self.source
        data = open_data_set(
            source.path or "", source.split, source.name, source.revision, source.streaming, self.section
        )
        names = data.column_names  # None if unknown before records are streamed
        for field in fields_of(source) if names else ():
            if field not in names:
                form = next(key for key in ("text_field", "chat_field", "tokens_field", "mask_field")
                            if getattr(source, key) == field)  # fmt: skip
                raise ValueError(
                    f"{self.section}.{form}: records of {source.path} have no field {field!r}; they have: {list(names)}"
                )
        return data.select_columns(fields_of(source)) if names else data

    def identity(self) -> str:
        """Digest of a local data set's files; for one on the Hub, the commit that its revision resolves to.

        Raises:
            ValueError: the data set cannot be opened or read.
        """
        source, size = self.source, "" if self.source.streaming else f", {len(self.data)} rows"
        try:
            found = _contents(source.path or "", source.split, source.name, source.revision)
        except ValueError as error:
            raise ValueError(f"{self.section}.path: {error}") from error
        return f"{source.name or 'default'}, split {source.split}{size}: {found}"

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`; a position is a shard's index and `state_dict` or, for a local data set, the rows read."""
        records = self._streamed(seed, start) if self.source.streaming else self._rows(seed, start or 0)
        for place, record, position in records:
            document = as_document(record, place, self.section, self.source)
            if document is not None:
                yield document, position

    def _streamed(self, seed: int, start: Any) -> Iterator[tuple[str, dict[str, Any], Callable[[], Any]]]:
        first, state = start or (0, None)
        shards = list(range(self.data.num_shards))
        random.Random(seed).shuffle(shards)
        for number, index in enumerate(shards[first:], first):
            shard = self.data.shard(len(shards), index)
            if state is not None:
                shard.load_state_dict(state)
                state = None
            read, records = 0, iter(shard)
            while True:
                place = f"{self.source.path}, shard {index}"
                try:
                    record = next(records, None)
                except Exception as error:  # datasets raises many types: network, format, codec
                    raise ValueError(
                        f"{self.section}.path: cannot continue in {place} after {read} more records: {error}"
                    ) from error
                if record is None:
                    break
                read += 1
                yield place, record, lambda number=number, shard=shard: [number, shard.state_dict()]

    def _rows(self, seed: int, start: int) -> Iterator[tuple[str, dict[str, Any], Callable[[], Any]]]:
        # NumPy guarantees that RandomState's numbers never change between versions.
        order = np.random.RandomState(seed % 2**32).permutation(len(self.data))
        for first in range(start, len(order), _BATCH):
            rows = order[first : first + _BATCH]
            columns = self.data[rows.tolist()]
            for offset, row in enumerate(rows):
                record = {name: values[offset] for name, values in columns.items()}
                yield f"{self.source.path}, row {row}", record, partial(int, first + offset + 1)


def _saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def open_data_set(
    path: str,
    split: str,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
    section: str = "data",
) -> Any:
    """One split of a data set: an `IterableDataset` if `streaming`, else a `Dataset`.

    Raises:
        ValueError: the data set cannot be opened.
    """
    import datasets

    path = str(expanded(path)) if path.startswith("~") else path
    try:
        if not _saved(Path(path)):
            return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"its splits are {', '.join(map(str, saved))}")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    except Exception as error:  # datasets raises many types; all of them mean that the configuration is wrong
        raise ValueError(f"{section}.path: cannot open data set {path!r}, split {split!r}: {error}") from error


def _contents(path: str, split: str, name: str | None, revision: str | None) -> str:
    folder = Path(path)
    if _saved(folder):
        of_split = folder / split if (folder / "dataset_dict.json").is_file() else folder
        return of_files(sorted(of_split.glob("*.arrow")))
    if folder.is_dir():
        return _origin(path, split, name, revision)
    return _origin_on_the_hub(path, split, name, revision)


def _origin(path: str, split: str, name: str | None, revision: str | None) -> str:
    """Identity of the files of a split: their contents if they are local, else the commit or tag of each."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, name, revision=revision)
    except Exception as error:  # as in `open_data_set`
        raise ValueError(f"cannot open data set {path!r}: {error}") from error
    by_split: Any = builder.config.data_files or {}
    lists = [by_split[split]] if split in by_split else list(by_split.values())
    names = [file for found in lists for file in found]
    if not names:
        return f"{builder.hash}"
    if all(Path(file).is_file() for file in names):
        return of_files([Path(file) for file in names])
    origins = sorted({" ".join(map(str, origin)) for found in lists for origin in found.origin_metadata})
    if len(origins) == 1:
        return f"{len(names)} files of {origins[0]}"
    return f"{len(names)} files, {hashlib.sha256(json.dumps([names, origins]).encode()).hexdigest()[:20]}"


_origin_on_the_hub = lru_cache(_origin)
"""Asked once per process, so that the data read is the revision recorded."""


def hf_records(path: str, split: str, name: str | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of a streamed data set, shuffled in a small buffer.

    Raises:
        ValueError: the data set cannot be opened.
    """
    yield from open_data_set(path, split, name).shuffle(seed=seed, buffer_size=1000)
