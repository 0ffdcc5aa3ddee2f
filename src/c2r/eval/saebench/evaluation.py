"""Evaluations run by an installed `sae-bench`: c2r passes it the SAE, and stores its result next to its own.

Written for sae-bench 0.6.0. sae-bench itself loads the language model (with TransformerLens or transformers) and its
data sets from the Hugging Face Hub, by the names that it knows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from c2r.config.run import ModelConfig
from c2r.eval.absorption.evaluation import domain
from c2r.eval.bench import Bench, Evaluation
from c2r.eval.outcome import Outcome, each
from c2r.eval.provenance import model_of
from c2r.eval.saebench.handover import HandedSAE, check_installed, mended_ravel, shapes_unchecked
from c2r.sae.model import SAE

PREFIX = "saebench:"


@dataclass(frozen=True)
class Foreign:
    """One of SAEBench's evaluations."""

    module: str
    """Module in `sae_bench.evals` that contains `run_eval`."""
    config: str
    """Name of the configuration class in that module."""
    shown: tuple[str, str]
    """Category and name of the figure that the table shows."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `run_eval`."""
    warning: str | None = None


ALL_COUNT = "sae-bench reads its own text, and includes tokens that the SAE's training left out as outliers"
_UNSAVED = {"clean_up_activations": True, "save_activations": False}  # they would take tens of gigabytes
_UNRELIABLE = "was found to be an unreliable measure of SAE quality (arXiv 2605.18229): do not rank SAEs by it"
FOREIGN = {
    "ravel": Foreign("ravel", "RAVELEvalConfig", ("ravel", "disentanglement_score")),
    "tpp": Foreign(
        "scr_and_tpp",
        "ScrAndTppEvalConfig",
        ("tpp_metrics", "tpp_threshold_20_total_metric"),
        {"perform_scr": False},
        _UNSAVED,
        f"TPP (targeted probe perturbation) {_UNRELIABLE}",
    ),
    "scr": Foreign(
        "scr_and_tpp",
        "ScrAndTppEvalConfig",
        ("scr_metrics", "scr_metric_threshold_20"),
        {"perform_scr": True},
        _UNSAVED,
        f"SCR (spurious correlation removal) {_UNRELIABLE}",
    ),
    "absorption": Foreign("absorption", "AbsorptionEvalConfig", ("mean", "mean_absorption_fraction_score")),
    "sparse_probing": Foreign(
        "sparse_probing", "SparseProbingEvalConfig", ("sae", "sae_top_1_test_accuracy"), arguments=_UNSAVED
    ),
    "meta_structure": Foreign(
        "meta_structure", "MetaStructureEvalConfig", ("meta_structure", "decoder_fraction_variance_explained")
    ),
}
"""Evaluations by their name after `saebench:`. Some also exist in c2r; they are included for comparison."""


def _evaluate(which: str, bench: Bench, name: str, sae: SAE) -> Outcome:
    """Run SAEBench's evaluation `which` on one SAE.

    Raises:
        ValueError: sae-bench is not installed, does not support the model or hook point, or fails.
    """
    foreign, version = FOREIGN[which], check_installed()
    if foreign.warning is not None:
        bench.console.print(f"[yellow]{escape(foreign.warning)}[/]")
    grad = torch.is_grad_enabled()
    try:
        result = _run(which, bench, name, sae)
    except ValueError:
        raise
    except Exception as error:  # third-party code: any error is a failure with this SAE; other SAEs continue
        raise ValueError(f"sae-bench {version}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_grad_enabled(grad)  # sae-bench changes it
    category, figure = foreign.shown
    return Outcome(
        name,
        result["eval_type_id"],
        result["eval_result_metrics"],
        {f"saebench_{which}": result["eval_result_metrics"][category][figure]},
        # sae-bench did not use c2r's model and text.
        config={"model": None, "data": None, "held_out": None, "tokens": None, **result["eval_config"]},
        details=result.get("eval_result_details") or [],
        unstructured={
            **(result.get("eval_result_unstructured") or {}),
            "sae_bench_version": version,
            "warning": foreign.warning,
            "counting": ALL_COUNT,
            "domain": domain(None, sae.width) if which == "absorption" else None,
        },
        file=f"saebench_{which}",
    )


def _run(which: str, bench: Bench, name: str, sae: SAE) -> dict[str, Any]:
    """Run sae-bench on the SAE, and read the result file that it writes."""
    foreign, model = FOREIGN[which], model_of(sae.config, bench.config.model)
    module = importlib.import_module(f"sae_bench.evals.{foreign.module}.main")
    batches = importlib.import_module("sae_bench.sae_bench_utils.activation_collection").LLM_NAME_TO_BATCH_SIZE
    model_name = _model_name(which, getattr(module, "LLM_NAME_MAP", {}), batches, model)
    batch = batches.get(model_name, 32)
    settings = {
        "model_name": model_name,
        "random_seed": bench.config.seed,
        "llm_batch_size": max(1, batch // 4) if which == "ravel" else batch,  # as on sae-bench's command line
        "llm_dtype": model.dtype,
        **foreign.settings,
    }
    config_class = getattr(module, foreign.config)
    known = {each_field.name for each_field in fields(config_class)}
    config = config_class(**{key: value for key, value in settings.items() if key in known})
    handed = HandedSAE(sae, model, model_name)
    mending = mended_ravel() if which == "ravel" else contextlib.nullcontext()
    with _scratch(bench.cache.folder / "sae_bench") as out, mending, shapes_unchecked(), torch.enable_grad():
        module.run_eval(config, [(name, handed)], str(bench.device), str(out), force_rerun=True, **foreign.arguments)
        written = sorted(out.rglob("*_eval_results.json"))
        if len(written) != 1:
            raise ValueError("sae-bench wrote no result; see its output for the reason")
        return json.loads(written[0].read_text(encoding="utf-8"))


def _model_name(which: str, ravel: dict[str, str], batches: dict[str, int], model: ModelConfig) -> str:
    """SAEBench's name of the model; `ravel` and `batches` are SAEBench's tables of models.

    Raises:
        ValueError: it has no name there, or SAEBench would use another model or hook point.
    """
    short = model.name.split("/")[-1]
    if which != "meta_structure":  # meta_structure uses no language model
        if model.name == "embedded" or Path(model.name).exists():
            raise ValueError(f"model: got {model.name!r}; sae-bench accepts names that TransformerLens knows")
        if model.revision is not None:
            raise ValueError(f"model.revision: got {model.revision!r}; sae-bench supports only the main revision")
        if model.center_writing_weights:
            raise ValueError(
                "model.center_writing_weights: got true; sae-bench supports only models with unmodified weights"
            )
    if which == "ravel":
        if short not in ravel:
            raise ValueError(f"model: got {model.name!r}; sae-bench's RAVEL accepts {', '.join(ravel.values())}")
        if model.hook != "resid_post":
            raise ValueError(f"model.hook: got {model.hook!r}; sae-bench's RAVEL accepts 'resid_post'")
    return short if short in batches else model.name


@contextlib.contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A fresh folder for results. Meanwhile `home` is the working directory, where sae-bench writes `artifacts/`."""
    before, home = Path.cwd(), home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as out:
        os.chdir(home)
        try:
            yield Path(out)
        finally:
            os.chdir(before)


def run_foreign(which: str) -> Evaluation:
    """SAEBench's evaluation `which` as one of c2r's."""
    return each(PREFIX + which, functools.partial(_evaluate, which))
