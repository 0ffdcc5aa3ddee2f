"""The table at the end of an evaluation: one column per SAE and, for two SAEs, the change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from c2r.intervals import paired_interval_95

NONE = "–"
Results = Mapping[str, Mapping[str, float | None]]
"""Figures of the table, by SAE and by key."""


_BY_SEED = "absorption_fraction_seed_"


class Row(NamedTuple):
    """One row of the table."""

    key: str
    """Key of the figure in summary.json."""
    label: str
    form: str
    upper: str | None = None
    """For an interval: key of its upper end; `key` is the lower end."""


ROWS = (
    Row("ev", "EV (explained variance)", ".4f"),
    Row("ce_recovered", "CE recovered", ".4f"),
    Row("l0", "L0 (learned threshold)", ".1f"),
    Row("alive", "alive latents", ".3f"),
    Row("absorption_fraction", "absorption fraction, first letters †", ".3f"),
    Row(
        "absorption_fraction_low", "  its 95 % interval over evaluation seeds", ".3f", upper="absorption_fraction_high"
    ),
    Row("full_absorption", "full absorption, first letters †", ".4f"),
    Row("split_features", "latents per first letter †", ".2f"),
    Row("letters", "letters with a good enough probe, of 26", ".0f"),
    Row("true_l0", "known features active per token", ".2f"),
    Row("known_absorption", "absorption of known parents", ".3f"),
    Row("hole", "recall of parents lost when a child is on", ".3f"),
    Row("latents_per_parent", "latents per known parent", ".2f"),
    Row("latents_per_feature", "latents per known feature", ".2f"),
    Row("mcc", "MCC with known features", ".3f"),
    Row("uniqueness", "distinct nearest features / latents", ".3f"),
    Row("feature_f1", "F1 of latents as detectors", ".3f"),
    Row("pw_mcc", "PW-MCC with other seeds", ".3f"),
    Row("pw_mcc_random", "PW-MCC of random dictionaries", ".3f"),
    Row("autointerp", "autointerp (share of windows judged correctly)", ".3f"),
    Row("autointerp_balanced", "autointerp, balanced accuracy (chance: 0.5)", ".3f"),
    Row("probe_dense", "accuracy of probes on activations x", ".3f"),
    Row("probe_top_1", "accuracy of probes on 1 latent", ".3f"),
    Row("probe_top_5", "accuracy of probes on 5 latents", ".3f"),
    Row("saebench_ravel", "RAVEL, disentanglement (sae-bench)", ".3f"),
    Row("saebench_tpp", "TPP, 20 latents (sae-bench; unreliable, arXiv 2605.18229)", ".3f"),
    Row("saebench_scr", "SCR, 20 latents (sae-bench; unreliable, arXiv 2605.18229)", ".3f"),
    Row("saebench_absorption", "absorption fraction (sae-bench)", ".3f"),
    Row("saebench_sparse_probing", "1-sparse probing accuracy (sae-bench)", ".3f"),
    Row("saebench_meta_structure", "meta-SAE's EV of the decoder (sae-bench) *", ".3f"),
    Row("matched_phi", "co-firing φ of pairs at one cosine §, mean", ".3f"),
    Row("neighbor_phi", "nearest neighbours' co-firing φ, mean *", ".3f"),
    Row("neighbor_jaccard", "nearest neighbours' co-firing, Jaccard, mean *", ".3f"),
    Row("composition_ev", "EV of the decoder by a meta-SAE *", ".3f"),
    Row("composition_ev_random", "  the same for random directions", ".3f"),
    Row("max_cos_mean", "nearest-neighbour cosine, mean *", ".3f"),
    Row("max_cos_p99", "nearest-neighbour cosine, 99th percentile *", ".3f"),
    Row("max_cos_share_over_0_5", "share above 0.5 *", ".4f"),
    Row("max_cos_share_over_0_7", "share above 0.7 *", ".4f"),
)
NOTE = (
    "* C²R moves this by construction, so it is no evidence that C²R works: pushing decoder rows apart lowers the "
    "cosine of nearest neighbours, their co-firing (pairs that are further apart fire together less often), and what "
    "rows have in common, which is all that a meta-SAE can explain."
)
FLOOR_NOTE = (
    "F random directions, F being the number of alive latents, have a nearest-neighbour cosine of about {floor} "
    "(√(2 ln F / D))."
)
MATCHED_NOTE = (
    "§ In each SAE, the pairs of latents whose cosine is nearest to {cosine:.3f}, the lowest mean nearest-neighbour "
    "cosine among these SAEs. Differences here are therefore not caused by different distances between the latents."
)
ABSORPTION_NOTE = (
    "† A dash means that the metric cannot be evaluated; the result file says why. Undertrained SAEs score deceptively "
    "low: compare EV, L0 and alive latents too. The interval is over evaluation seeds, not over SAEs."
)
DOMAIN_NOTE = (
    "† for {names}: SAEBench does not recommend this metric for language models under 1 billion parameters or for SAEs "
    "under 16k latents, so the figure is evidence neither for nor against a method there."
)
KNOWN_NOTE = (
    "Synthetic activations whose features are known (docs/reference/metrics.md). Absorption: the share of tokens with "
    "an active parent and an active child on which the parent's latent is silent and another latent represents it."
)


def summary(results: Results) -> list[dict[str, Any]]:
    """The content of `summary.json`: one object per SAE."""
    return [{"name": name, **figures} for name, figures in results.items()]


def summary_of_files(evaluations: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The same, read from result files; those that were moved to `earlier/` are ignored."""
    rows = [{"name": name} for name in names]
    for row in rows:
        for path in sorted(evaluations.glob(f"{row['name']}_*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["sae_lens_id"] == row["name"]:
                row |= found["eval_result_unstructured"].get("summary", {})
    return rows


def shown(rows: list[dict[str, Any]]) -> list[Row]:
    """Rows for which at least one SAE has a figure."""
    return [figure for figure in ROWS if any(figure.key in row for row in rows)]


def number(value: float | None, form: str) -> str:
    """The formatted value; a dash if there is none."""
    return NONE if value is None or not math.isfinite(value) else format(value, form)


def cell(row: dict[str, Any], figure: Row) -> str:
    """The text of one cell."""
    shown = number(row.get(figure.key), figure.form)
    if figure.upper is None or shown == NONE:
        return shown
    return f"{shown} to {number(row.get(figure.upper), figure.form)}"


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Footnotes of the figures shown."""
    found = _unfinished(rows)
    if any("*" in figure.label for figure in shown(rows)):
        found.append(NOTE)
    if floors := sorted({f"{value:.2f}" for value in _values(rows, "max_cos_random_floor")}):
        found.append(FLOOR_NOTE.format(floor=" to ".join(dict.fromkeys((floors[0], floors[-1])))))
    if matched := _values(rows, "matched_cosine"):
        found.append(MATCHED_NOTE.format(cosine=matched[0]))
    if any("absorption_fraction" in row for row in rows):
        found += [*_absorption_said(rows), ABSORPTION_NOTE]
    if outside := [row["name"] for row in rows if row.get("absorption_in_domain") == 0]:
        found.append(DOMAIN_NOTE.format(names=", ".join(outside)))
    if any("known_absorption" in row for row in rows):
        found.append(KNOWN_NOTE)
    return found


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Finite values of one figure."""
    found = (row.get(key) for row in rows)
    return [value for value in found if value is not None and math.isfinite(value)]


def _unfinished(rows: list[dict[str, Any]]) -> list[str]:
    """A line per SAE whose training was stopped early; the head of its column is marked too."""
    return [
        f"‡ {row['name']} is unfinished: it was trained on {row['trained_tokens']:,.0f} of {row['train_tokens']:,.0f} "
        "tokens. Do not compare it with SAEs trained on more."
        for row in rows
        if row.get("trained_tokens") is not None
    ]


def heading(row: dict[str, Any]) -> str:
    """The head of an SAE's column: its name, marked if training was stopped early."""
    return f"{row['name']} ‡" if row.get("trained_tokens") is not None else row["name"]


def _absorption_said(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence on whether the last SAE has less absorption than the first, with an interval over evaluation seeds.

    In each evaluation seed both SAEs get the same words, prompts and probes, so the comparison is paired by seed.
    """
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    seeds = [key for key in first if key.startswith(_BY_SEED) and first[key] is not None and last.get(key) is not None]
    interval = paired_interval_95([first[key] for key in seeds], [last[key] for key in seeds])
    if interval is None:
        return []
    low, high = interval
    said = "lower" if high < 0 else "higher" if low > 0 else "no significant difference"
    return [
        f"Absorption fraction on the language model, {last['name']} minus {first['name']}, paired over "
        f"{len(seeds)} evaluation seeds: {(low + high) / 2:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), {said}."
    ]


def print_results(results: Results, console: Console | None = None) -> None:
    """Print the SAEs side by side; with two, also the change from the first to the second."""
    console = console or Console()
    rows = summary(results)
    table = Table(title=None)
    table.add_column("")
    for row in rows:
        table.add_column(escape(heading(row)), justify="right")
    if len(rows) == 2:
        table.add_column("change", justify="right")
    for figure in shown(rows):
        values = [row.get(figure.key) for row in rows]
        cells = [cell(row, figure) for row in rows]
        if len(values) == 2 and figure.upper is not None:
            cells.append("")
        elif len(values) == 2:
            first, last = values
            change = None if first is None or last is None else last - first
            cells.append(number(change, "+" + figure.form))
        table.add_row(figure.label, *cells)
    console.print(table)
    for note in notes(rows):
        console.print(note, style="dim")
