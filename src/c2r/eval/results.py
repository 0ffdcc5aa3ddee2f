"""Result files in SAEBench's form: one JSON an evaluation and SAE."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

Metrics = dict[str, dict[str, float]]


class Histogram(TypedDict):
    """Counts of values in bins of equal width; values outside count in the first or last bin."""

    low: float
    high: float
    counts: list[int]


def histogram(values: Tensor, low: float, high: float, bins: int = 60) -> Histogram:
    """Bin the finite `values`."""
    finite = values[values.isfinite()].double().cpu().clamp(low, high)
    return {"low": low, "high": high, "counts": [int(n) for n in torch.histc(finite, bins, low, high)]}


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity, which JSON lacks, become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(_finite(content, None), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
) -> Path:
    """Write `<sae>_<file or evaluation>.json`, the envelope that SAEBench's plots and tables read; return its path."""
    path = folder / f"{sae_name}_{file or evaluation}.json"
    write_json(
        path,
        {
            "eval_type_id": evaluation,
            "eval_config": config,
            "eval_id": str(uuid.uuid4()),
            "datetime_epoch_millis": int(time.time() * 1000),
            # SAEBench's core schema demands every figure, -1 where there is none.
            "eval_result_metrics": _finite(metrics, -1 if evaluation == "core" else None),
            "eval_result_details": details or [],
            "sae_bench_commit_hash": "",
            "sae_lens_id": sae_name,
            "sae_lens_release_id": "c2r",
            "sae_lens_version": sae_config.get("metadata", {}).get("sae_lens_version"),
            "sae_cfg_dict": sae_config,
            "eval_result_unstructured": (unstructured or {}) | {"not_a_number": _not_numbers(metrics)},
        },
    )
    return path


def _not_numbers(metrics: Metrics) -> list[str]:
    """Figures that there are none of, `category.name`: in `core` they stand as −1, which others may be too."""
    return [
        f"{category}.{name}"
        for category, figures in metrics.items()
        for name, value in figures.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]


def _finite(node: Any, missing: int | None) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value, missing) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value, missing) for value in node]
    return missing if isinstance(node, float) and not math.isfinite(node) else node
