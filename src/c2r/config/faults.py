"""Turns pydantic's validation errors into sentences: the field, what was given, and what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from c2r.config.base import Frozen

RENAMED = {
    "words": "spelling_fraction",
    "buffer_tokens": "window_tokens",
    "text_tokens": "text_window_tokens",
    "ahead_tokens": "prefetch_tokens",
    "rows": "model_rows",
    "share": "words_per_prompt",
}
"""Former name → current name of a key."""
Location = tuple[int | str, ...]
Section = TypeVar("Section", bound=Frozen)


def checked_section(section: type[Section], given: dict[str, Any], where: str = "") -> Section:
    """Validate a section of the configuration given as plain values.

    Arguments:
        where: prefix of the field names in messages, such as `absorption`.

    Raises:
        ValueError: values are invalid; one sentence per value.
    """
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise ValueError("; ".join(faults(error, lambda location: fields_of(section, location), where))) from None


def faults(error: ValidationError, accepted: Callable[[Location], list[str]], where: str = "") -> list[str]:
    """One sentence per validation error.

    Arguments:
        accepted: maps a location to the keys of the section there.
        where: prefix of the field names.
    """
    return [_sentence(fault, accepted, where) for fault in error.errors()]


def _sentence(fault: Any, accepted: Callable[[Location], list[str]], where: str) -> str:
    location: Location = fault["loc"]
    field = ".".join(filter(None, (where, *map(str, location)))) or "configuration"
    if fault["type"] == "extra_forbidden":
        key, known = str(location[-1]), accepted(location[:-1])
        near = difflib.get_close_matches(key, known, n=1)
        if RENAMED.get(key) in known:
            return f"{field}: renamed to {RENAMED[key]!r}; accepted are {', '.join(known)}"
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{field}: unknown key; accepted are {', '.join(known)}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":  # raised by our own validators, whose messages name the field
        return f"{field}: {message}" if location or where else message
    hint = ""
    if fault["type"] == "string_type" and isinstance(fault["input"], int | float):
        hint = "; quote text that looks like a number, true or false"
    shown = "" if fault["type"] == "missing" else f" (got {fault['input']!r}{hint})"
    return f"{field}: {message}{shown}"


def fields_of(section: type[Frozen], location: Location) -> list[str]:
    """Accepted keys of the section at `location` within `section`."""
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Frozen)):
            break
        section = field.annotation
    return [field.alias or name for name, field in section.model_fields.items()]
