"""The main job: a baseline and its C²R twin on real activations, evaluated side by side."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from c2r.config import RunConfig, load_config
from c2r.eval.results import write_json
from c2r.eval.suite import evaluate
from c2r.report.html import write_report
from c2r.report.table import print_results, summary
from c2r.train.trainer import METRICS_FILE, RUN_FILE, train

EVALUATION_TOKENS = 40_000
SUITES = ("core", "absorption", "splitting")


def run_demo(out: Path) -> None:
    """Train, evaluate, print the table, write `summary.json` and `report.html` under `out`."""
    began = time.monotonic()
    console = Console()
    config = load_config(Path(str(files("c2r") / "assets" / "demo.yaml"))).model_copy(update={"output": out})
    folders = train(config, overwrite=_is_a_demo(out, config), console=console)
    results = evaluate(
        list(folders.values()), out / "evaluations", suites=SUITES, tokens=EVALUATION_TOKENS, console=console
    )
    write_json(out / "summary.json", summary(results))
    write_report(out / "report.html", out / METRICS_FILE, out / "evaluations", list(folders))
    print_results(results, console)
    minutes = (time.monotonic() - began) / 60
    console.print(f"\n{minutes:.1f} minutes. Everything is in {out}:")
    console.print(f"  {out / 'report.html'}   the same with curves and distributions; opens offline")
    console.print(f"  {out / 'summary.json'}  the table's figures;  {out / 'evaluations'}/  all figures")
    console.print("  " + "  ".join(map(str, folders.values())) + "   the SAEs; SAELens opens them as they are")
    console.print(f"next: c2r.load('{folders['c2r']}') in Python, or a copy of {out / 'run.yaml'} and c2r train")


def _is_a_demo(out: Path, config: RunConfig) -> bool:
    """Whether `out` holds this very demo, which may be made anew; anything else is the user's."""
    try:
        return load_config(out / RUN_FILE).model_copy(update={"output": out}) == config
    except ValueError:
        return False
