"""Activations on disk: a manifest, one line per shard, and safetensors files; read back as the model emitted them.

    manifest.json                                what the activations were made from, and statistics measured on them
    shards.jsonl                                 one line per shard: tokens, where its text begins, sizes and checksums
    000000.tokens.safetensors                    ids int32 [n], where int32 [n, 2] (row, position in the row)
    000000.blocks.12.hook_resid_post.safetensors x [n, D], norms fp32 [n]; one file per hook point

n tokens of a shard · D width of the activations.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from c2r.activations.identify import local_differences
from c2r.activations.reader import Part
from c2r.config.hooks import HookPoint
from c2r.config.run import RunConfig
from c2r.storage import cannot_write, marked, strangers, whole

FORMAT, MANIFEST, SHARDS, TOKENS = 2, "manifest.json", "shards.jsonl", "tokens"
_CHUNK, _PART_TOKENS = 2**20, 8192


class CacheReader:
    """Parts of a cache, in the order of the text; after the last shard, further rounds in a shuffled order of shards.

    A shard's files are memory-mapped and their checksums verified before any of it is served. This loads them into the
    system's page cache, from which rows are then read.

    Arguments:
        folder: the cache.
        points: hook points to read; the cache must have them.
        seed: seed of the order of shards after the first round.
    """

    def __init__(self, folder: Path, points: Sequence[HookPoint], *, seed: int = 0) -> None:
        self.folder, self.points, self.seed = folder, points, seed
        self.shards = read_shards(folder)

    def decode(self, token: int) -> str | None:
        """The text of a token, if the harvest recorded it as one with a large norm."""
        looks = (read_manifest(self.folder) or {}).get("look", {})
        return {sink["id"]: sink["text"] for look in looks.values() for sink in look["sinks"]}.get(token)

    def read(self, start: Any = None) -> Iterator[Part]:
        """See `ActivationReader`.

        Raises:
            ValueError: a shard is missing or damaged; the message says which and what to do.
        """
        start = start or {"round": 0, "shard": 0, "token": 0}
        for number in itertools.count(start["round"]):
            for place in range(start["shard"], len(self.shards)):
                yield from self._parts(number, place, start["token"])
                start = {**start, "token": 0}
            start = {"round": number + 1, "shard": 0, "token": 0}

    def _parts(self, number: int, place: int, begin: int) -> Iterator[Part]:
        shard = self.shards[self._order(number)[place]]
        tokens = load(self.folder, shard, TOKENS)
        read = {point: load(self.folder, shard, point.name) for point in self.points}
        for first in range(begin, shard["tokens"], _PART_TOKENS):
            piece = slice(first, first + _PART_TOKENS)
            yield Part(
                {point: tensors["x"][piece] for point, tensors in read.items()},
                {point: tensors["norms"][piece] for point, tensors in read.items()},
                tokens["ids"][piece],
                tokens["where"][piece],
                {"round": number, "shard": place, "token": first},
            )

    def _order(self, number: int) -> list[int]:
        if number == 0:
            return list(range(len(self.shards)))
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * number) % 2**32)
        return torch.randperm(len(self.shards), generator=generator).tolist()


def open_cache(config: RunConfig) -> dict[str, Any]:
    """The manifest of the configured cache, after checking that it is complete and matches the configuration.

    Text and model are compared with the cache's by their contents, if they are on this machine; they need not be.

    Raises:
        ValueError: there is no cache, `c2r harvest` has not finished, or the cache was made from something else; the
            message lists the differences.
    """
    assert config.cache is not None
    folder = config.cache.path
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"cache.path: {folder} holds no cache; run `c2r harvest` with this configuration first")
    check_origin(manifest, config)
    refuse_differences(config, local_differences(manifest["identity"], config))
    if not manifest["complete"]:
        raise ValueError(
            f"cache.path: {folder} is not finished; run `c2r harvest` again, which resumes where it stopped"
        )
    return manifest


def origin_of(config: RunConfig) -> dict[str, Any]:
    """The settings from which a configuration's activations are made."""
    model, cache = config.model, config.cache
    centred = {"center_writing_weights": True} if model.center_writing_weights else {}
    dtype = None if cache is None else cache.dtype
    return {
        "model": {
            "name": model.name,
            "revision": model.revision,
            "dtype": model.dtype,
            "tokenizer": model.tokenizer,
            **centred,
        },
        "data": config.data.model_dump(mode="json", exclude={"workers"}),
        "seed": config.seed,
        "stream": {"model_rows": config.stream.model_rows, "text_window_tokens": config.stream.text_window_tokens},
        "cache": {"dtype": dtype or ("bfloat16" if model.dtype == "bfloat16" else "float32")},
    }


def check_origin(manifest: dict[str, Any], config: RunConfig) -> None:
    """Reject a cache that was made from other settings or lacks a hook point.

    Raises:
        ValueError: lists the differences, one per line.
    """
    found = [
        f"{field}: the cache has {had!r}, the configuration says {said!r}"
        for field, had, said in _differences(manifest["origin"], origin_of(config))
    ]
    missing = [point.name for point in config.points if point.name not in manifest["points"]]
    if missing:
        found.append(f"hook points: the cache has {', '.join(manifest['points'])} but not {', '.join(missing)}")
    refuse_differences(config, found)


def refuse_differences(config: RunConfig, found: list[str]) -> None:
    """Reject the configured cache if there are any differences.

    Raises:
        ValueError: lists the differences, one per line.
    """
    if found:
        raise ValueError(
            f"cache.path: {config.cache.path if config.cache else None} was made from other data, another "
            "model or other settings; give another path, or delete that folder and run `c2r harvest`\n"
            + "\n".join(f"  {line}" for line in found)
        )


def _differences(had: Any, said: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(had, dict) and isinstance(said, dict):
        for key in dict.fromkeys([*had, *said]):
            yield from _differences(had.get(key), said.get(key), f"{field}.{key}" if field else key)
    elif had != said:
        yield field, had, said


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None if there is none.

    Raises:
        ValueError: the folder holds something other than a cache, or the manifest is damaged or has another format.
    """
    foreign = f"cache.path: {folder} holds something other than a cache; give a new or empty folder"
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"cache.path: {folder} is not a folder; give a new or empty folder")
    if not (folder / MANIFEST).is_file():
        if folder.is_dir() and strangers(folder, "cache"):
            raise ValueError(foreign)
        return None
    ours = marked(folder, "cache")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"cache.path: {folder / MANIFEST} is damaged ({error}); delete {folder} and run `c2r harvest`"
        raise ValueError(said if ours else foreign) from error
    if known != FORMAT and (ours or "origin" in manifest):
        raise ValueError(
            f"cache.path: {folder} has format {known}, which does not record everything it was made from; this version "
            f"of c2r reads format {FORMAT}. Give another path, or delete that folder, and run `c2r harvest`"
        )
    if not ours:
        raise ValueError(foreign)
    return manifest


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """The entries of `shards.jsonl`, one per shard; an incomplete last line is ignored."""
    path = folder / SHARDS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def load(folder: Path, shard: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of one file of a shard, memory-mapped, after verifying its checksum.

    Raises:
        ValueError: the file is missing or damaged, or cannot be mapped; the message says what to do.
    """
    path = folder / file_name(shard["number"], name)
    fault = size_fault(folder, shard, name)
    if fault is None:
        try:  # not shared: writing to a tensor does not change the file
            mapped = torch.from_file(str(path), False, shard["files"][name]["bytes"], dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(f"cache.path: cannot map {path} into memory: {error}") from error
        if _digest(mapped) == shard["files"][name]["xxh3_128"]:
            return _tensors(mapped)
        fault = "its checksum does not match"
    raise ValueError(
        f"cache.path: {path} is damaged: {fault}; delete it and run `c2r harvest` again, which recreates this shard"
    )


def _digest(data: Tensor) -> str:
    """Checksum of a file's bytes, computed in chunks so that Ctrl-C is handled between them."""
    digest = xxhash.xxh3_128()
    for chunk in data.split(_CHUNK):
        numbers: Any = chunk.numpy()
        digest.update(numbers)
    return digest.hexdigest()


def size_fault(folder: Path, shard: dict[str, Any], name: str) -> str | None:
    """What is wrong with a file, judged by its size alone; None if nothing."""
    path, expected = folder / file_name(shard["number"], name), shard["files"][name]["bytes"]
    if not path.is_file():
        return "it does not exist"
    found = path.stat().st_size
    return None if found == expected else f"it has {found:,} bytes of {expected:,}"


def _tensors(data: Tensor) -> dict[str, Tensor]:
    """Views into the bytes of a safetensors file: the header's length (8 bytes), a JSON header, the tensors."""
    begin = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:begin].numpy().tobytes())
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
    return {
        name: data[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
        .view(dtypes[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def file_name(number: int, name: str) -> str:
    """Name of a shard's file."""
    return f"{number:06d}.{name}.safetensors"


def write_shard(folder: Path, number: int, parts: Sequence[Part], end: Any) -> dict[str, Any]:
    """Write a shard's files, each atomically, and return its entry; `end` is the position where the next shard begins.

    Raises:
        ValueError: a file cannot be written; the message gives its size.
    """
    contents = {TOKENS: {key: torch.cat([getattr(part, key) for part in parts]) for key in ("ids", "where")}}
    for point in parts[0].x:
        tensors = {"x": [part.x[point] for part in parts], "norms": [part.norms[point] for part in parts]}
        contents[point.name] = {key: torch.cat(pieces) for key, pieces in tensors.items()}
    shard = {"number": number, "tokens": sum(map(len, parts)), "parts": len(parts), "start": parts[0].position}
    return shard | {"end": end, "files": {name: _write(folder, number, name, t) for name, t in contents.items()}}


def _write(folder: Path, number: int, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    path = folder / file_name(number, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    digest = xxhash.xxh3_128()
    try:
        with whole(path) as partial:
            save_file(tensors, partial)
            with partial.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cache.path: {cannot_write(path, size, error)}") from error
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
