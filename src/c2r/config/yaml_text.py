"""A YAML loader for configurations that is stricter than YAML 1.1 where the latter silently does the unexpected.

Errors: a key that is duplicate, has no value or is not a string; a second document; tabs. Only `true` and `false` are
booleans, and `no`, `on`, `12:30`, `007` and `2024-01-31` remain strings.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.scanner import ScannerError


class _Fault(ValueError):
    pass


class _Loader(yaml.SafeLoader):
    """Safe loader with the rules of this module."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Check a mapping's keys before `<<` is merged into it: its own keys may override merged ones."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Fault(f"line {line}: a key must be a string; got {_snippet(key)!r}")
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                kind = key.tag.rpartition(":")[2]
                raise _Fault(f"line {line}: a key must be a string; got {key.value!r}, which YAML reads as {kind}")
            if key.value in lines:
                raise _Fault(f"line {line}: {key.value!r} is given twice, first in line {lines[key.value]}; keep one")
            lines[key.value] = line
        return node

    def construct_yaml_null(self, node: Any) -> None:
        if not node.value:  # an empty `c2r:` would silently train without C²R
            raise _Fault(
                f"line {node.start_mark.line + 1}, {_snippet(node)!r}: no value given; add one, remove the key, or "
                "write null if none is intended"
            )


def _snippet(node: Any) -> str:
    shown = node.start_mark.get_snippet(indent=0)
    return "" if shown is None else shown.splitlines()[0].strip()


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0o[0-7_]+", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+0123456789."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _firsts = [character if character != "\0" else "" for character in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _firsts)
_Loader.add_constructor("tag:yaml.org,2002:null", _Loader.construct_yaml_null)


def load_yaml(text: str) -> Any:
    """Load a YAML text as dicts, lists and scalars. Anchors are copied, so that no two places share an object.

    Raises:
        ValueError: not YAML, or something that this module refuses; names the line.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except _Fault:
        raise
    except ComposerError as error:
        if error.problem == "but found another document":
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            raise ValueError(f"line {line}: a second document begins; a file contains one configuration") from error
        raise ValueError(f"not valid YAML: {error}") from error
    except ScannerError as error:
        mark = error.problem_mark
        if mark is not None and "\\t" in (error.problem or ""):
            raise ValueError(
                f"line {mark.line + 1}, column {mark.column + 1}: a tab; indent YAML with spaces"
            ) from error
        raise ValueError(f"not valid YAML: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"not valid YAML: {error}") from error


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
