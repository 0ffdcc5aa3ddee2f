"""Where C²R helps and where it fails on known features: the traps' tables, and a picture of them.

    python benchmarks/known_features.py rotation_trap --json > a.json        (and pair, over_merge_trap)
    python benchmarks/known_features_chart.py a.json … --plot docs/results/known-features.svg

Reads what `known_features.py --json` printed, any number of files a preset.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from c2r.report.html import COLORS, HEIGHT, WIDTH, Points, line_chart

# preset → its parameter, the figure to draw ("1 − " what it lacks), what the picture calls it, figures of the table.
PANELS = {
    "rotation_trap": (
        "ratio", "absorption", "rotation trap: absorption, by P(parent alone) / P(both)",
        ("ev", "l0", "absorption", "parent_cos", "child_cos", "mcc"),
    ),
    "over_merge_trap": (
        "kappa", "1 − mcc", "over-merge trap: 1 − MCC, by the cosine within pairs",
        ("ev", "l0", "alive", "mcc", "uniqueness", "f1"),
    ),
    "pair": (
        "epsilon", "1 − child_cos", "pair: 1 − the child's cosine, by P(child alone)",
        ("ev", "l0", "absorption", "parent_cos", "child_cos", "mcc"),
    ),
}  # fmt: skip


def label(c2r: dict[str, Any] | None) -> str:
    """One variant of the penalty."""
    return "baseline" if c2r is None else f"ρ {c2r['strength']:g}" + ("" if c2r["alpha"] == 1 else ", α 0")


def table(preset: str, rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    parameter, _, _, shown = PANELS[preset]
    lines = [f"| {parameter} | | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
    for row in rows:
        figures = [row["figures"][name] for name in shown]
        cells = " | ".join(f"{figure['mean']:.3f} ± {figure['sd']:.3f}" for figure in figures)
        lines.append(f"| {row['parameters'][parameter]:.3g} | {label(row['c2r'])} | {cells} |")
    return "\n".join(lines)


def panel(preset: str, rows: list[dict[str, Any]], x: int) -> str:
    """One chart at `x` of the picture, with its title and its legend."""
    parameter, name, title, _ = PANELS[preset]
    series: dict[str, Points] = defaultdict(list)
    for row in rows:
        mean = row["figures"][name.removeprefix("1 − ")]["mean"]
        series[label(row["c2r"])].append((row["parameters"][parameter], mean if name[0] != "1" else 1 - mean))
    figure = line_chart(title, parameter, series)
    chart = figure[figure.index("<svg") : figure.index("</svg>") + len("</svg>")]
    drawn = f'<text x="{x + 10}" y="18" font-weight="bold">{title}</text>'
    for place, (variant, color) in enumerate(zip(series, COLORS, strict=False)):
        at = x + 46 + 95 * place
        drawn += f'<rect x="{at}" y="27" width="14" height="3" fill="{color}"/>'
        drawn += f'<text x="{at + 19}" y="33">{variant}</text>'
    return drawn + chart.replace("<svg", f'<svg x="{x}" y="40"', 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in args.files:
        run = json.loads(path.read_text())
        found[run["preset"]] += run["rows"]
    panels = {name: sorted(found[name], key=lambda row: row["parameters"][PANELS[name][0]]) for name in PANELS
              if found[name]}  # fmt: skip
    for name, rows in panels.items():
        print(f"{name}, {len(rows[0]['figures']['ev']['seeds'])} seeds\n\n{table(name, rows)}\n")
    if args.plot:
        drawn = "".join(panel(name, rows, i * (WIDTH + 10)) for i, (name, rows) in enumerate(panels.items()))
        width, height = len(panels) * (WIDTH + 10), HEIGHT + 50
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        args.plot.write_text(f'{opening} font-family="sans-serif" font-size="12">{drawn}</svg>\n', encoding="utf-8")


if __name__ == "__main__":
    main()
