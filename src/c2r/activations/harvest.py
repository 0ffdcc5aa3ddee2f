"""`c2r harvest`: fill a cache of activations, resume an interrupted harvest, and recreate missing files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from torch import Tensor

from c2r.activations.cache import (
    FORMAT,
    MANIFEST,
    SHARDS,
    check_origin,
    file_name,
    load,
    open_cache,
    origin_of,
    read_manifest,
    read_shards,
    refuse_differences,
    size_fault,
    write_shard,
)
from c2r.activations.identify import Identity, files_of, identity_of
from c2r.activations.look import say_looks
from c2r.activations.prefetch import Ahead
from c2r.activations.reader import CALIBRATION_TOKENS, LiveReader, Part, check_kept, live_reader, measure, usual
from c2r.config.hooks import HookPoint
from c2r.config.run import RunConfig
from c2r.config.text import DataConfig
from c2r.identity import differences
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.machine import pick_device
from c2r.storage import Busy, cannot_write, held, read_held, record, sweep, write_text
from c2r.text.packing import check_source, opens_with_bos

_QUIET_SECONDS = 20.0


def fill_cache(config: RunConfig, *, verify: bool = False, console: Console | None = None) -> Path:
    """Harvest `cache.tokens` (default: `train.tokens`) tokens, not counting outliers, and return the cache's folder.

    Shards and their entries are written one after another, each atomically, so that an interruption loses at most the
    current shard. Files that are missing or have the wrong size are recreated. Meanwhile no other process may read or
    write the cache.

    Arguments:
        verify: also verify the checksums of all existing files.

    Raises:
        ValueError: no cache is configured; its folder holds something else, cannot be written, is in use by another
            process, or was made from something else; the disk is too small; or an error of the model or the text.
    """
    console = console or Console(stderr=True)
    if config.cache is None or not isinstance(config.data, DataConfig):
        raise ValueError("cache: no such section; add `cache: {path: runs/activations}`, the folder to write to")
    folder = config.cache.path
    manifest = read_manifest(folder)  # before creating or marking the folder
    if manifest is not None:
        check_origin(manifest, config)
    check_source(config.data)
    try:
        with held(folder, "cache", "cache.path", "harvesting into", say=console.print):
            record(folder, "cache", (MANIFEST, SHARDS, "*.safetensors"), "cache.path")
            sweep(folder)
            _fill(config, read_manifest(folder), verify, console)
    except Busy as busy:
        if not busy.readers or verify:
            raise
        with read_held(folder, "cache.path"):  # runs are reading it: a harvest that has nothing to do succeeds anyway
            if not _said_complete(config, console):
                raise busy from None
    return folder


def _fill(config: RunConfig, manifest: dict[str, Any] | None, verify: bool, console: Console) -> None:
    """Fill a cache whose folder this process has locked; `manifest` is its current manifest, if any."""
    assert config.cache is not None and isinstance(config.data, DataConfig)  # noqa: PT018
    folder = config.cache.path
    lm = load_language_model(config.model, pick_device(config.train.device))
    dtype: torch.dtype = getattr(torch, origin_of(config)["cache"]["dtype"])
    reader, identity = live_reader(config, lm, dtype), identity_of(config.data, lm)
    reader.skipped.say = lambda message: console.print(f"[yellow]{escape(message)}[/]", soft_wrap=True)
    if manifest is None:
        manifest = _new_manifest(config, lm, identity)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n", "cache.path")
    else:
        check_origin(manifest, config)
        refuse_differences(config, differences(manifest["identity"], identity, "was", "is now"))
    reader.points = tuple(map(HookPoint.of, manifest["points"]))
    _extend(config, manifest, reader, _mend(folder, reader, verify, console), console)
    if (report := reader.skipped.report) is not None:
        console.print(f"[yellow]{report}[/]")


def _said_complete(config: RunConfig, console: Console) -> bool:
    """Whether a cache that is being read already has all requested tokens; if so, report it."""
    assert config.cache is not None
    manifest, target = open_cache(config), config.cache.tokens or config.train.tokens
    shards = read_shards(config.cache.path)
    if any(size_fault(config.cache.path, shard, name) for shard in shards for name in shard["files"]):
        return False
    kept = sum(_kept_of_shard(config.cache.path, shard, manifest, config) for shard in shards)
    if kept >= target:
        _say_nothing_to_do(config.cache.path, kept, target, console)
    return kept >= target


def _say_nothing_to_do(folder: Path, kept: int, target: int, console: Console) -> None:
    console.print(f"{folder} has {kept:,} tokens of {target:,} requested: nothing to do", soft_wrap=True)


def _new_manifest(config: RunConfig, lm: LanguageModel, identity: Identity) -> dict[str, Any]:
    assert isinstance(config.data, DataConfig)
    return {
        "format": FORMAT,
        "complete": False,
        "origin": origin_of(config),
        "identity": {**identity, "files": files_of(config.model)},
        "points": [point.name for point in config.points],
        "d_in": lm.d_in,
        "prepend_bos": opens_with_bos(config.data, lm.tokenizer),
    }


def _mend(folder: Path, reader: LiveReader, verify: bool, console: Console) -> list[dict[str, Any]]:
    """The existing shards, after recreating those with a missing or damaged file."""
    shards = read_shards(folder)
    for place, shard in enumerate(shards):
        faults = [fault for name in shard["files"] if (fault := size_fault(folder, shard, name))]
        if verify and not faults:
            try:
                for name in shard["files"]:
                    load(folder, shard, name)
            except ValueError as error:
                faults = [str(error)]
        if faults:
            console.print(
                f"[yellow]shard {shard['number']:06d}: {faults[0].split(';')[0]}; recreating it[/]", soft_wrap=True
            )
            parts = list(itertools.islice(reader.read(shard["start"]), shard["parts"]))
            shards[place] = write_shard(folder, shard["number"], parts, shard["end"])
            write_text(folder / SHARDS, "".join(map(_line, shards)), "cache.path")
    return shards


def _extend(
    config: RunConfig, manifest: dict[str, Any], reader: LiveReader, shards: list[dict[str, Any]], console: Console
) -> None:
    """Add shards until the cache has the requested number of tokens."""
    assert config.cache is not None
    dtype: torch.dtype = getattr(torch, manifest["origin"]["cache"]["dtype"])
    folder, target, size = config.cache.path, config.cache.tokens or config.train.tokens, config.cache.shard_tokens
    counts = [_kept_of_shard(folder, shard, manifest, config) for shard in shards]
    if (kept := sum(counts)) >= target:
        _record(config, manifest, shards, kept, complete=True)
        _say_nothing_to_do(folder, kept, target, console)
        return
    if shards and shards[-1]["end"] is None:  # the last shard of a shorter harvest: rewrite it in full
        shards.pop()
        kept -= counts.pop()
    _check_room(folder, (target - kept) * manifest["d_in"] * dtype.itemsize * len(reader.points))
    # This also removes an incomplete last line.
    write_text(folder / SHARDS, "".join(map(_line, shards)), "cache.path")
    _record(config, manifest, shards, kept, complete=False)
    ahead = Ahead(partial(reader.read, shards[-1]["end"] if shards else None), size)
    try:
        parts: Iterator[Part] = iter(ahead.take, None)
        if "median_norm" not in manifest:
            first = _measured(config, manifest, reader, parts, target)
            say_looks(manifest["look"], config.stream.max_norm_multiple, console)
            parts = itertools.chain(first, parts)
            _record(config, manifest, shards, kept, complete=False)
        pending: list[Part] = []
        seen, before = 0, kept
        say = _progress(kept, target, console)
        for part in parts:
            if sum(map(len, pending)) >= size:
                _add(folder, shards, pending, part.position)
                pending = []
            pending.append(part)
            kept += _kept(part.norms, manifest, config)
            seen += len(part)
            check_kept(seen, kept - before, config.stream)
            say(kept)
            if kept >= target:
                break
        else:
            console.print(f"[yellow]the text ended after {kept:,} of {target:,} tokens[/]", soft_wrap=True)
        if pending:
            _add(folder, shards, pending, None)
    finally:
        ahead.close()
    _record(config, manifest, shards, kept, complete=True)
    console.print(f"{kept:,} tokens in {len(shards)} shards", soft_wrap=True)


def _measured(
    config: RunConfig, manifest: dict[str, Any], reader: LiveReader, parts: Iterator[Part], target: int
) -> list[Part]:
    """Add to the manifest what a stream measures on its first tokens; return the parts read for it."""
    wanted, first = min(CALIBRATION_TOKENS, config.stream.window_tokens, target), []
    while sum(map(len, first)) < wanted and (part := next(parts, None)) is not None:
        first.append(part)
    for name, values in measure(first, wanted, config.stream, reader.decode)._asdict().items():
        manifest[name] = {point.name: value for point, value in values.items()}
    return first


def _kept(norms: dict[HookPoint, Tensor], manifest: dict[str, Any], config: RunConfig) -> int:
    """Number of tokens that a stream over all hook points would keep."""
    median = {point: manifest["median_norm"][point.name] for point in norms}
    return int(usual(norms, median, config.stream).sum())


def _kept_of_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any], config: RunConfig) -> int:
    norms = {}
    for point in map(HookPoint.of, manifest["points"]):
        path = folder / file_name(shard["number"], point.name)
        try:
            with safe_open(path, "pt") as tensors:
                norms[point] = tensors.get_tensor("norms")
        except SafetensorError as error:
            raise ValueError(f"cache.path: {path} is damaged ({error}); run `c2r harvest` with --verify") from error
    return _kept(norms, manifest, config)


def _add(folder: Path, shards: list[dict[str, Any]], parts: list[Part], end: Any) -> None:
    """Write a shard, then its entry, so that every listed shard is complete."""
    shards.append(write_shard(folder, len(shards), parts, end))
    line = _line(shards[-1])
    try:
        with (folder / SHARDS).open("a", encoding="utf-8") as lines:
            lines.write(line)
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as error:
        raise ValueError(f"cache.path: {cannot_write(folder / SHARDS, len(line), error)}") from error


def _record(
    config: RunConfig, manifest: dict[str, Any], shards: list[dict[str, Any]], kept: int, *, complete: bool
) -> None:
    assert config.cache is not None
    manifest |= {
        "complete": complete,
        "tokens": sum(shard["tokens"] for shard in shards),
        "max_norm_multiple": config.stream.max_norm_multiple,
        "kept": kept,
    }
    write_text(config.cache.path / MANIFEST, json.dumps(manifest, indent=2) + "\n", "cache.path")


def _line(shard: dict[str, Any]) -> str:
    return json.dumps(shard) + "\n"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"cache.path: {folder} needs about {needed / 1e9:.1f} GB more, but the disk has {free / 1e9:.1f} GB free; "
            "use another path, fewer cache.tokens, or cache.dtype: bfloat16"
        )


def _progress(kept: int, target: int, console: Console) -> Callable[[int], None]:
    """A function that prints progress from time to time."""
    began = said = time.monotonic()

    def say(now_kept: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > _QUIET_SECONDS:
            said, rate = now, (now_kept - kept) / (now - began)
            left = (target - now_kept) / rate / 60
            console.print(f"{now_kept:,}/{target:,} tokens {rate:,.0f} tok/s, {left:.1f} min left", soft_wrap=True)

    return say
