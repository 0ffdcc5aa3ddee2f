"""Loads a configuration from a YAML file and `a.b=c` overrides; every error message names the field."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from c2r.config.base import Frozen, at_home
from c2r.config.faults import Location, faults
from c2r.config.known_features import PRESETS
from c2r.config.run import CacheConfig, ModelConfig, RunConfig, StreamConfig, TrackingConfig, TrainConfig, WandbConfig
from c2r.config.saes import SECTIONS, ConsistencyConfig, SAEConfig
from c2r.config.text import DataConfig, MixturePart
from c2r.config.yaml_text import load_yaml


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML and apply `a.b=c` overrides. Numbers index into lists: `saes.0.k=16`.

    Raises:
        ValueError: no such file, invalid YAML, a key without a value or given twice, an override of something that
            does not exist, or invalid values; names the field, what was given and what is accepted.
    """
    raw = read_mapping(path, "output, model, data, train, saes, …")
    set_values(raw, overrides)
    return parse_config(raw, str(path))


def read_mapping(path: Path, keys: str) -> dict[str, Any]:
    """The content of a YAML file.

    Arguments:
        keys: examples of what it should contain, for errors.

    Raises:
        ValueError: the file cannot be read, is not valid YAML, or is not a mapping.
    """
    path = at_home(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    try:
        raw = load_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping with keys {keys}; got {type(raw).__name__}")
    return raw


def parse_config(raw: Any, where: str) -> RunConfig:
    """Validate a configuration given as plain dicts and lists.

    Raises:
        ValueError: invalid values, one line per error.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = faults(error, lambda location: _fields_at(location, raw))
        raise ValueError(f"{where}: {len(lines)} error(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


def _fields_at(location: Location, raw: dict[str, Any]) -> list[str]:
    sections: dict[Any, type[Frozen]] = {
        "model": ModelConfig,
        "data": DataConfig,
        "parts": MixturePart,
        "stream": StreamConfig,
        "cache": CacheConfig,
        "train": TrainConfig,
        "tracking": TrackingConfig,
        "wandb": WandbConfig,
        "c2r": ConsistencyConfig,
    }
    if location[:1] == ("saes",):
        method = raw["saes"][location[1]].get("method", "batch_top_k")
        sections["saes"] = SECTIONS.get(method, SAEConfig)
    if location[:1] == ("data",) and raw["data"].get("source") == "synthetic":
        sections["data"] = PRESETS[raw["data"]["preset"]]
    named = [part for part in location if part in sections]
    fields = (sections[named[-1]] if named else RunConfig).model_fields
    return [field.alias or name for name, field in fields.items()]


def set_values(raw: Any, overrides: Iterable[str]) -> None:
    """Apply several `a.b=c` overrides, each key at most once.

    Raises:
        ValueError: a key is given twice; see also `set_value`.
    """
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in given:
            raise ValueError(f"{key}: given twice, as {given[key]!r} and {value!r}; keep one")
        given[key] = value
        set_value(raw, override)


def set_value(raw: Any, override: str) -> None:
    """Apply one `a.b=c` override to nested dicts and lists, in place.

    Raises:
        ValueError: not of this form, or there is no such place.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override: got {override!r}; expected a.b=c, for example train.lr=3e-4 or saes.0.k=16")
    node, parts = raw, key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{key}: {part!r} is not an index into a list of {len(node)}")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = part
        else:
            raise ValueError(f"{key}: {'.'.join(parts[:depth])} is {node!r}, which has no fields")
        if last:
            if not value.strip():
                raise ValueError(f"{key}: no value given; write null if none is intended")
            try:
                node[place] = load_yaml(value)
            except ValueError as error:
                raise ValueError(f"{key}: got {value!r}: {error}") from error
        else:
            node = node.setdefault(place, {}) if isinstance(node, dict) else node[place]
            if node is None:
                raise ValueError(
                    f"{key}: {'.'.join(parts[: depth + 1])} is null in the file; override the whole section"
                )
