"""Base class and field types of the configuration's sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_WHOLE = re.compile(r"\d+(\.\d*)?[eE]\+?\d+")


def _whole(value: Any) -> Any:
    """Convert text such as 2e6, which YAML 1.1 does not read as a number, to an integer."""
    return int(float(value)) if isinstance(value, str) and _WHOLE.fullmatch(value) else value


def at_home(path: Any) -> Any:
    """Expand a leading `~` in a path to the user's home folder.

    Raises:
        ValueError: `~name`, and there is no such user.
    """
    if not str(path).startswith("~"):
        return path
    try:
        return type(path)(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"got {str(path)!r}: {error}; write the full path") from error


Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]

Share = Annotated[float, Field(ge=0, le=1)]

NotNegative = Annotated[float, Field(ge=0)]


class Frozen(BaseModel):
    """A section of the configuration: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)
