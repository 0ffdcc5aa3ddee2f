"""What every section of the configuration is made of: immutable, unknown keys refused, counts as people write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_WHOLE = re.compile(r"\d+(\.\d*)?[eE]\+?\d+")


def _whole(value: Any) -> Any:
    """YAML 1.1 reads 2e6 as text; take it as the count it was meant to be."""
    return int(float(value)) if isinstance(value, str) and _WHOLE.fullmatch(value) else value


def at_home(path: Any) -> Any:
    """A path in which `~` at the beginning is the user's home folder, as a shell has it; all else as it is.

    Raises:
        ValueError: `~name` of a user who is not there.
    """
    if not str(path).startswith("~"):
        return path
    try:
        return type(path)(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"got {str(path)!r}: {error}; write the folder out") from error


Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]

Share = Annotated[float, Field(ge=0, le=1)]

NotNegative = Annotated[float, Field(ge=0)]


class Frozen(BaseModel):
    """A section of the configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)
