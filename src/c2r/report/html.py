"""A self-contained HTML page of a run: table, training curves and distributions as inline SVG. Opens offline."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c2r.report.table import cell, heading, notes, shown, summary_of_files
from c2r.storage import write_text

COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2")
WIDTH, HEIGHT, MARGIN = 460, 240, 46
Points = list[tuple[float, float]]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .25rem .9rem; border-bottom: 1px solid #ddd }}
td + td, th + th {{ text-align: right; font-variant-numeric: tabular-nums }}
figure {{ display: inline-block; margin: .5rem 1rem .5rem 0 }} figcaption {{ font-weight: 600 }}
small {{ color: #666 }} svg text {{ font: 11px system-ui, sans-serif; fill: #555 }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write_report(
    path: Path, metrics_file: Path, evaluations: Path, names: Sequence[str], *, known_features: Path | None = None
) -> None:
    """Write the page from a run's files: `metrics.jsonl` and the JSON files of its evaluations.

    `known_features` is the demo's `known_features.json`; it becomes a second table.
    """
    rows = summary_of_files(evaluations, names)
    curves = _curves(metrics_file, names)
    charts = [
        line_chart("Explained variance while training", "tokens", {n: c["ev"] for n, c in curves.items()}),
        line_chart("Penalty / reconstruction loss", "tokens", {n: c["penalty_ratio"] for n, c in curves.items()}),
    ]
    histograms = {name: _histograms(evaluations, name) for name in names}
    drawn = {
        "max_cos": "Nearest-neighbour cosine * (dashed: random directions)",
        "phi": "Co-firing φ of nearest neighbours *",
        "log10_density": "log10 firing density of alive latents",
    }
    for key, caption in drawn.items():
        mark = rows[0]["max_cos_random_floor"] if key == "max_cos" else None
        charts.append(step_chart(caption, {name: found[key] for name, found in histograms.items()}, mark))
    legend = " ".join(
        f'<span style="color:{color}">■ {html.escape(name)}</span>'
        for name, color in zip(names, _cycle(names), strict=True)
    )
    body = f"{_table(rows)}<p>{legend}</p>{''.join(charts)}"
    if known_features is not None:
        body += f"<h2>On known features</h2>{_table(json.loads(known_features.read_text(encoding='utf-8')))}"
    write_text(path, PAGE.format(title=html.escape("c2r: " + " and ".join(names)), body=body), "out")


def line_chart(caption: str, x_label: str, series: dict[str, Points]) -> str:
    """A line chart with shared axes, as inline SVG."""
    xs = [x for points in series.values() for x, _ in points] or [0.0, 1.0]
    ys = [y for points in series.values() for _, y in points] or [0.0, 1.0]
    box = (0.0, max(xs), min(0.0, *ys), max(ys) or 1.0)
    lines = [_polyline(points, box, color) for points, color in zip(series.values(), _cycle(series), strict=True)]
    return _figure(caption, _axes(box, x_label) + "".join(lines))


def step_chart(caption: str, series: dict[str, dict[str, Any]], mark: float | None = None) -> str:
    """Histograms drawn as outlines on shared axes, as inline SVG; `mark` is the position of a dashed vertical line."""
    first = next(iter(series.values()))
    top = max((max(h["counts"]) for h in series.values()), default=1) or 1
    box = (first["low"], first["high"], 0.0, float(top))
    drawn = ""
    for histogram, color in zip(series.values(), _cycle(series), strict=True):
        size = (histogram["high"] - histogram["low"]) / len(histogram["counts"])
        edges = [(histogram["low"] + i * size, n) for i, n in enumerate(histogram["counts"])]
        drawn += _polyline([(x + dx, float(n)) for x, n in edges for dx in (0.0, size)], box, color)
    if mark is not None:
        x = _place((mark, 0.0), box)[0]
        drawn += f'<line x1="{x}" x2="{x}" y1="8" y2="{HEIGHT - MARGIN}" stroke="#888" stroke-dasharray="4 3"/>'
    return _figure(caption, _axes(box, "") + drawn)


def _cycle(names: Sequence[str] | dict[str, Any]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(names))]


def _curves(path: Path, names: Sequence[str]) -> dict[str, dict[str, Points]]:
    curves: dict[str, dict[str, Points]] = {name: {"ev": [], "penalty_ratio": []} for name in names}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for key, points in curves[record["sae"]].items():
            points.append((record["tokens"], record[key]))
    return curves


def _histograms(evaluations: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for evaluation in ("core", "splitting"):
        found |= json.loads((evaluations / f"{name}_{evaluation}.json").read_text())["eval_result_unstructured"]
    return found


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(heading(row))}</th>" for row in rows)
    body = ""
    for figure in shown(rows):
        cells = "".join(f"<td>{cell(row, figure)}</td>" for row in rows)
        body += f"<tr><td>{html.escape(figure.label)}</td>{cells}</tr>"
    said = "<br>".join(html.escape(note) for note in notes(rows))
    return f"<table><tr><th></th>{head}</tr>{body}</table><p><small>{said}</small></p>"


def _place(point: tuple[float, float], box: tuple[float, float, float, float]) -> tuple[float, float]:
    (x, y), (left, right, low, high) = point, box
    across = MARGIN + (x - left) / ((right - left) or 1) * (WIDTH - MARGIN - 10)
    return round(across, 1), round(8 + (high - y) / ((high - low) or 1) * (HEIGHT - MARGIN - 8), 1)


def _polyline(points: Points, box: tuple[float, float, float, float], color: str) -> str:
    places = " ".join(f"{x},{y}" for x, y in (_place(point, box) for point in points))
    return f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def _axes(box: tuple[float, float, float, float], x_label: str) -> str:
    left, right, low, high = box
    drawn = ""
    for i in range(5):
        x, y = left + (right - left) * i / 4, low + (high - low) * i / 4
        (at, _), (_, up) = _place((x, low), box), _place((left, y), box)
        drawn += f'<text x="{at}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{_short(x)}</text>'
        drawn += f'<text x="{MARGIN - 6}" y="{up + 4}" text-anchor="end">{_short(y)}</text>'
        drawn += f'<line x1="{MARGIN}" x2="{WIDTH - 10}" y1="{up}" y2="{up}" stroke="#eee"/>'
    return drawn + f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _figure(caption: str, inside: str) -> str:
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{inside}</svg>'
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>"
