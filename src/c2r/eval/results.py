"""Result files in SAEBench's format: one JSON file per evaluation and SAE."""

from __future__ import annotations

import json
import math
import tempfile
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from torch import Tensor

from c2r.layout import EARLIER
from c2r.storage import write_text

Metrics = dict[str, dict[str, float]]


class Histogram(TypedDict):
    """Counts of values in bins of equal width; values out of range are counted in the first or last bin."""

    low: float
    high: float
    counts: list[int]


def histogram(values: Tensor, low: float, high: float, bins: int = 60) -> Histogram:
    """Bin the finite `values`."""
    finite = values[values.isfinite()].double().cpu().clamp(low, high)
    return {"low": low, "high": high, "counts": [int(n) for n in torch.histc(finite, bins, low, high)]}


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinity, which JSON lacks, become null.

    Raises:
        ValueError: it cannot be written; names the file.
    """
    text = json.dumps(_finite(content, None), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot create the folder {path.parent}: {error.strerror}") from error
    write_text(path, text, "out")


def write_result(
    folder: Path,
    *,
    evaluation: str,
    sae_name: str,
    sae_config: dict[str, Any],
    config: dict[str, Any],
    metrics: Metrics,
    details: list[dict[str, Any]] | None = None,
    unstructured: dict[str, Any] | None = None,
    file: str | None = None,
    console: Console | None = None,
) -> Path:
    """Write `<sae>_<file or evaluation>.json`, in the format that SAEBench's plots and tables read; return its path.

    An earlier result of that name is replaced if it has the same settings and comes from the same SAE, text and model,
    compared by their contents. Any other is moved to `earlier/` with its date in its name, and the new path is printed.

    Raises:
        ValueError: it cannot be written. The result is then saved in a temporary folder, which the message names.
    """
    path = folder / f"{sae_name}_{file or evaluation}.json"
    content = {
        "eval_type_id": evaluation,
        "eval_config": config,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        # SAEBench's core schema requires every figure, and -1 for a missing one.
        "eval_result_metrics": _finite(metrics, -1 if evaluation == "core" else None),
        "eval_result_details": details or [],
        "sae_bench_commit_hash": "",
        "sae_lens_id": sae_name,
        "sae_lens_release_id": "c2r",
        "sae_lens_version": sae_config.get("metadata", {}).get("sae_lens_version"),
        "sae_cfg_dict": sae_config,
        "eval_result_unstructured": (unstructured or {}) | {"not_a_number": _not_numbers(metrics)},
    }
    try:
        keep_earlier(path, content, console)
        write_json(path, content)
    except (OSError, ValueError) as error:
        aside = Path(tempfile.mkdtemp(prefix="c2r-result-")) / path.name
        write_json(aside, content)
        raise ValueError(f"{error}; the result was saved as {aside} instead") from error
    return path


def _not_numbers(metrics: Metrics) -> list[str]:
    """Names `category.name` of figures without a value, needed for `core`: there they are −1, like some real values."""
    return [
        f"{category}.{name}"
        for category, figures in metrics.items()
        for name, value in figures.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]


def keep_earlier(path: Path, content: dict[str, Any], console: Console | None = None) -> None:
    """Move an existing result to `earlier/` unless its SAE, settings, text and model equal those of the new one."""
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if _question(earlier) == _question(json.loads(json.dumps(content))):
            return
        made = earlier["datetime_epoch_millis"] / 1000
    except (ValueError, KeyError, TypeError, AttributeError):  # not a result of c2r
        made = path.stat().st_mtime
    date = datetime.fromtimestamp(made, timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    stem = f"{path.stem}_{date}"
    (path.parent / EARLIER).mkdir(exist_ok=True)
    taken = {found.stem for found in (path.parent / EARLIER).iterdir()}
    stem = next(name for name in (stem, *(f"{stem}_{i}" for i in range(2, len(taken) + 3))) if name not in taken)
    for file in (path, path.with_suffix(".html")):  # the page of an audit
        if file.is_file():
            file.rename(path.parent / EARLIER / f"{stem}{file.suffix}")
    if console is not None:
        kept = path.parent / EARLIER / f"{stem}.json"
        console.print(f"moved an earlier result with other settings, text, model or weights to {kept}", soft_wrap=True)


def _question(result: dict[str, Any]) -> Any:
    """What identifies a result: evaluation, settings, SAE, text and model, but not the versions of the code."""
    config = dict(result["eval_config"])
    identity = {part: said for part, said in config.pop("identity", {}).items() if part != "code"}
    return _finite([result["eval_type_id"], config, identity], None)


def unfinished(sae_config: dict[str, Any]) -> dict[str, float | None]:
    """For an SAE whose training was stopped early: tokens seen (`trained_tokens`) and planned (`train_tokens`). Empty
    for all others, including those whose file does not say.
    """
    try:
        ours = sae_config["c2r"]
        seen, wanted, stopped = ours["state"]["tokens"], ours["train"]["tokens"], ours["state"]["stopped"]
    except (KeyError, TypeError):
        return {}
    return {} if stopped is None and seen >= wanted else {"trained_tokens": seen, "train_tokens": wanted}


def _finite(node: Any, missing: int | None) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value, missing) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value, missing) for value in node]
    return missing if isinstance(node, float) and not math.isfinite(node) else node
