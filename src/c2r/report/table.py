"""The table at the end of an evaluation: a column an SAE, and the change from the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from c2r.eval.core import CoreResult


class Row(NamedTuple):
    """One figure of the table."""

    key: str
    """Its name in summary.json."""
    label: str
    form: str


ROWS = (
    Row("ev", "EV (explained variance)", ".4f"),
    Row("ce_recovered", "CE recovered", ".4f"),
    Row("l0", "L0 (learned threshold)", ".1f"),
    Row("alive", "alive latents", ".3f"),
    Row("neighbor_phi", "nearest neighbours' co-firing φ, mean", ".3f"),
    Row("max_cos_mean", "nearest-neighbour cosine, mean *", ".3f"),
    Row("max_cos_p99", "nearest-neighbour cosine, 99th percentile *", ".3f"),
    Row("max_cos_share_over_0_5", "share above 0.5 *", ".4f"),
    Row("max_cos_share_over_0_7", "share above 0.7 *", ".4f"),
)
NOTE = (
    "* what C²R optimises: shown, and no evidence that it works. Random directions of this shape have about "
    "{floor:.2f} (√(2 ln F / D))."
)


def summary(results: dict[str, CoreResult]) -> list[dict[str, Any]]:
    """One object an SAE, as `summary.json` holds them."""
    return [_summary(name, result.core, result.splitting) for name, result in results.items()]


def summary_of_files(evaluations: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The same from the result files of an evaluation."""
    rows = []
    for name in names:
        core, splitting = (
            json.loads((evaluations / f"{name}_{evaluation}.json").read_text())["eval_result_metrics"]
            for evaluation in ("core", "splitting")
        )
        rows.append(_summary(name, core, splitting["splitting"]))
    return rows


def _summary(name: str, core: dict[str, dict[str, float]], splitting: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "ev": core["reconstruction_quality"]["explained_variance"],
        "ce_recovered": core["model_performance_preservation"]["ce_loss_score"],
        "l0": core["sparsity"]["l0"],
        "alive": core["misc_metrics"]["frac_alive"],
        "neighbor_phi": splitting["neighbor_phi_mean"],
        **{key: value for key, value in splitting.items() if key.startswith("max_cos")},
    }


def print_results(results: dict[str, CoreResult], console: Console | None = None) -> None:
    """Print SAEs side by side, with the change from the first to the last where there are two."""
    console = console or Console()
    rows = summary(results)
    table = Table(title=None)
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], justify="right")
    if len(rows) == 2:
        table.add_column("change", justify="right")
    for figure in ROWS:
        values = [row[figure.key] for row in rows]
        cells = [format(value, figure.form) for value in values]
        if len(values) == 2:
            cells.append(format(values[1] - values[0], "+" + figure.form))
        table.add_row(figure.label, *cells)
    console.print(table)
    console.print(NOTE.format(floor=rows[0]["max_cos_random_floor"]), style="dim")
