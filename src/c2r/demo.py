"""The demo: train and evaluate a baseline SAE and the same SAE with C²R, on a language model and on known features."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from c2r.config.load import load_config
from c2r.config.run import RunConfig
from c2r.eval.results import write_json
from c2r.eval.suite import evaluate
from c2r.layout import (
    EVALUATIONS,
    KNOWN_FEATURES,
    KNOWN_FEATURES_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    SUMMARY_FILE,
)
from c2r.report.html import write_report
from c2r.report.table import print_results, summary
from c2r.storage import in_the_way, record
from c2r.training.folder import KIND, finished
from c2r.training.trainer import train

EVALUATION_TOKENS = 40_000
SUITES = ("core", "absorption", "splitting")
_PAGES = (SUMMARY_FILE, KNOWN_FEATURES_FILE, REPORT_FILE)


def run_demo(out: Path) -> None:
    """Train, evaluate and print two tables; write `summary.json`, `known_features.json` and `report.html` to `out`."""
    began = time.monotonic()
    console = Console()
    config = _asset("demo.yaml", out)
    taken = in_the_way(out, KIND, _PAGES) if out.is_dir() else []
    if taken:
        raise ValueError(
            f"out: {out} contains files that are not from a demo ({', '.join(taken)}); expected a new or empty folder"
        )
    folders = train(config, overwrite=_is_a_demo(out, config) and finished(config), console=console)
    record(out, KIND, _PAGES, "out")
    results = evaluate(
        list(folders.values()), out / EVALUATIONS, suites=SUITES, tokens=EVALUATION_TOKENS, console=console
    )
    write_json(out / SUMMARY_FILE, summary(dict(results)))
    known = demo_of_known_features(out / KNOWN_FEATURES, console)
    write_json(out / KNOWN_FEATURES_FILE, summary(known))
    write_report(
        out / REPORT_FILE, out / METRICS_FILE, out / EVALUATIONS, list(folders),
        known_features=out / KNOWN_FEATURES_FILE,
    )  # fmt: skip
    console.print("\nOn the language model's activations:")
    print_results(dict(results), console)
    console.print("\nOn known features (synthetic activations), where the true features can be compared with:")
    print_results(known, console)
    minutes = (time.monotonic() - began) / 60
    console.print(f"\n{minutes:.1f} minutes. Everything is in {out}:")
    console.print(f"  {out / REPORT_FILE}   both tables, training curves and distributions; opens offline")
    console.print(f"  {out / SUMMARY_FILE}, {out / KNOWN_FEATURES_FILE}  the figures of the tables")
    console.print(f"  {out / EVALUATIONS}/, {out / KNOWN_FEATURES / EVALUATIONS}/  all results")
    console.print("  " + "  ".join(map(str, folders.values())) + "   the SAEs; SAELens can load them")
    console.print(
        f"next: c2r.load('{folders['c2r']}') in Python, or edit a copy of {out / RUN_FILE} and run c2r train with it"
    )


def demo_of_known_features(out: Path, console: Console) -> dict[str, dict[str, float | None]]:
    """Train and evaluate the same two methods on the preset `tree`; return the figures of the table by SAE."""
    config = _asset("known_features.yaml", out)
    folders = train(config, overwrite=_is_a_demo(out, config) and finished(config), console=console)
    return dict(evaluate(list(folders.values()), suites=("recovery",), console=console))


def _asset(name: str, out: Path) -> RunConfig:
    """A configuration that ships with the package, writing to `out`."""
    return load_config(Path(str(files("c2r") / "assets" / name))).model_copy(update={"output": out})


def _is_a_demo(out: Path, config: RunConfig) -> bool:
    """Whether `out` contains a run with this configuration, which may be resumed or replaced; other files are kept."""
    try:
        return load_config(out / RUN_FILE).model_copy(update={"output": out}) == config
    except ValueError:
        return False
