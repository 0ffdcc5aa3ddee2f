"""Studies: arms × seeds, trained on shared streams, evaluated, and compared over training seeds.

Everything resumes: finished runs are not trained again, and an SAE that was evaluated with the same settings keeps its
figures. Tables are made only from the files in `results/`, one per SAE.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from c2r.config.study import StudyConfig, sae_name
from c2r.eval.results import write_json
from c2r.eval.suite import evaluate
from c2r.identity import of_files
from c2r.intervals import Interval, bootstrap_95
from c2r.layout import EVALUATIONS, SAE_WEIGHTS
from c2r.report.table import ROWS, number
from c2r.storage import write_text
from c2r.training.trainer import train

RESULTS, STUDY_FILE, TABLE_FILE = "results", "study.json", "study.md"


class Compared(NamedTuple):
    """One figure of one arm over the training seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for one seed."""
    seeds: int
    """Seeds for which there is a figure."""
    change: float | None = None
    """Mean difference to the arm of reference over the seeds that both have."""
    interval: Interval | None = None
    """95 % interval of that difference, by a paired bootstrap over training seeds."""
    pairs: int = 0


def run_study(config: StudyConfig, console: Console | None = None) -> Path:
    """Train, evaluate and compare; return the path of `study.json`.

    Raises:
        ValueError: see `train` and `evaluate`; also if evaluations failed, after all others are done.
    """
    console = console or Console(stderr=True)
    failed: list[str] = []
    runs = config.runs()
    for number_, run in enumerate(runs, 1):
        console.print(f"run {number_} of {len(runs)}: {run.output}", soft_wrap=True)
        folders = train(run, console=console)
        failed += _evaluate(config, folders, run.output / EVALUATIONS, console)
    compared = compare(config)
    write_json(config.output / STUDY_FILE, as_json(config, compared))
    write_text(config.output / TABLE_FILE, as_markdown(config, compared), "output")
    print_study(config, compared, console)
    if failed:
        lines = "\n".join(f"  {line}" for line in failed)
        raise ValueError(f"evaluations failed; run the same command again to repeat them:\n{lines}")
    return config.output / STUDY_FILE


def _evaluate(config: StudyConfig, folders: dict[str, Path], out: Path, console: Console) -> list[str]:
    """Evaluate the SAEs of one run that have no figures for these settings yet; return what failed."""
    asked = config.evaluation.model_dump(mode="json")
    weights = {name: of_files([folder / SAE_WEIGHTS]) for name, folder in folders.items()}
    missing = [
        name
        for name in folders
        if (found := _result(config, name)) is None or (found["evaluation"], found["sae"]) != (asked, weights[name])
    ]
    if not missing:
        return []
    results = evaluate([folders[name] for name in missing], out, config.evaluation, console=console)
    for name in missing:
        if not any(line.startswith(f"{name}, ") for line in results.failed):
            arm, _, seed = name.rpartition("-")
            content = {"arm": arm, "seed": int(seed), "sae": weights[name], "evaluation": asked}
            write_json(config.output / RESULTS / f"{name}.json", content | {"figures": results[name]})
    return results.failed


def _result(config: StudyConfig, name: str) -> dict[str, Any] | None:
    try:
        return json.loads((config.output / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def compare(config: StudyConfig) -> dict[str, dict[str, Compared]]:
    """Arm → figure → its value over seeds and its difference to the arm `config.against`, from the files on disk."""
    by_arm: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in config.arms}
    for seed in config.seeds:
        for arm in config.arms_of(seed):
            if (found := _result(config, sae_name(arm, seed))) is not None:
                figures = found["figures"].items()
                by_arm[arm][seed] = {key: value for key, value in figures if _is_number(value)}
    reference = by_arm[config.against]
    return {
        arm: {
            key: _compared(key, seeds, None if arm == config.against else reference)
            for key in dict.fromkeys(key for figures in seeds.values() for key in figures)
        }
        for arm, seeds in by_arm.items()
    }


def _compared(key: str, own: dict[int, dict[str, float]], other: dict[int, dict[str, float]] | None) -> Compared:
    values = [figures[key] for figures in own.values() if key in figures]
    sd = statistics.stdev(values) if len(values) > 1 else None
    found = Compared(statistics.fmean(values), sd, len(values))
    pairs = [
        figures[key] - other[seed][key]
        for seed, figures in own.items()
        if other is not None and key in figures and key in other.get(seed, {})
    ]
    if not pairs:
        return found
    return found._replace(change=statistics.fmean(pairs), interval=bootstrap_95(pairs), pairs=len(pairs))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def as_json(config: StudyConfig, compared: dict[str, dict[str, Compared]]) -> dict[str, Any]:
    """The content of `study.json`."""
    arms = {arm: {key: found._asdict() for key, found in figures.items()} for arm, figures in compared.items()}
    return {"study": config.model_dump(mode="json"), "against": config.against, "arms": arms}


def rows_of(compared: dict[str, dict[str, Compared]]) -> list[list[str]]:
    """The table's lines: a figure's label, then per arm its mean ± sd and the difference with its interval."""
    lines = []
    for row in ROWS:
        if row.upper is not None or not any(row.key in figures for figures in compared.values()):
            continue
        line = [row.label]
        for figures in compared.values():
            found = figures.get(row.key)
            if found is None:
                line.append(number(None, row.form))
                continue
            text = number(found.mean, row.form) + ("" if found.sd is None else f" ± {number(found.sd, row.form)}")
            if found.change is not None:
                text += f" ({number(found.change, '+' + row.form)}"
                if found.interval is not None:
                    low, high = (number(end, "+" + row.form) for end in found.interval)
                    text += f", {low} to {high}"
                text += ")"
            line.append(text)
        lines.append(line)
    return lines


def _seeds(compared: dict[str, dict[str, Compared]], arm: str) -> str:
    return f"{arm} ({max((found.seeds for found in compared[arm].values()), default=0)} seeds)"


NOTE = (
    "Mean ± sample standard deviation over training seeds; in brackets the mean difference to {against} over the seeds "
    "that both have, with its 95 % interval by a paired bootstrap over training seeds. C²R moves figures marked * by "
    "construction, so they are no evidence that it works."
)


def as_markdown(config: StudyConfig, compared: dict[str, dict[str, Compared]]) -> str:
    """The table as Markdown."""
    heads = ["", *(_seeds(compared, arm) for arm in compared)]
    lines = [heads, ["---"] * len(heads), *rows_of(compared)]
    escaped = [[text.replace("*", r"\*").replace("|", r"\|") for text in line] for line in lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
    note = NOTE.format(against=config.against).replace("*", r"\*")
    return f"{table}\n\n{note}\n"


def print_study(config: StudyConfig, compared: dict[str, dict[str, Compared]], console: Console) -> None:
    """Print the table."""
    table = Table(title=None)
    table.add_column("")
    for arm in compared:
        table.add_column(escape(_seeds(compared, arm)), justify="right")
    for line in rows_of(compared):
        table.add_row(*line)
    console.print(table)
    console.print(NOTE.format(against=config.against), style="dim")
    console.print(f"results: {config.output / RESULTS}; {config.output / STUDY_FILE}", soft_wrap=True)
