"""What evaluations return: an outcome per SAE and evaluation, and the results of a whole call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from c2r.eval.results import Metrics
from c2r.sae.model import SAE

Summary = dict[str, float | None]
"""Figures of one SAE by name; None where there is none."""
FAILURES = (ValueError, RuntimeError, ArithmeticError, OSError)
"""Errors that an SAE, a text or the machine can cause. They end one evaluation and let the others complete; any other
error is a bug of c2r and is raised with its traceback."""


@dataclass
class Outcome:
    """One evaluation of one SAE: a result file, and its part of the table."""

    sae: str
    evaluation: str
    """SAEBench's type id where it has one."""
    metrics: Metrics = field(default_factory=dict)
    summary: Summary = field(default_factory=dict)
    """What the table and `summary.json` show."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of this evaluation, in addition to those of the call."""
    details: list[dict[str, Any]] = field(default_factory=list)
    unstructured: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    """The result is written to `<sae>_<file>.json`; None: `evaluation`."""
    error: str | None = None
    """Why there is no result."""


@dataclass(frozen=True, eq=False)
class Results(Mapping[str, Summary]):
    """What `c2r.evaluate` returns; `results["my_sae"]["ev"]` is a figure. Results with the same figures are equal."""

    figures: dict[str, Summary]
    """What the table shows, by SAE."""
    files: dict[str, list[Path]]
    """Result files that were written, by SAE."""
    failed: list[str]
    """A line per evaluation that failed, or whose result could not be written where it belongs."""

    def __getitem__(self, sae: str) -> Summary:
        return self.figures[sae]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)


B = TypeVar("B")


def each(evaluation: str, one: Callable[[B, str, SAE], Outcome]) -> Callable[[B, dict[str, SAE]], Iterator[Outcome]]:
    """An evaluation that handles SAEs one by one; if one SAE fails, the others still complete."""

    def run(bench: B, saes: dict[str, SAE]) -> Iterator[Outcome]:
        for name, sae in saes.items():
            try:
                outcome = one(bench, name, sae)
            except FAILURES as error:
                outcome = failure(name, evaluation, error)
            yield outcome

    return run


def failure(name: str, evaluation: str, error: Exception) -> Outcome:
    """The outcome of an evaluation that raised `error`."""
    return Outcome(name, evaluation, error=f"{type(error).__name__}: {error}")
