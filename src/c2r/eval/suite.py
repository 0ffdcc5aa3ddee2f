"""Evaluate SAE folders: the model loaded once, every SAE on the same text, one JSON an evaluation and SAE."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from c2r.config import DataConfig, ModelConfig
from c2r.data.harvest import load_language_model, pick_device
from c2r.data.labelled import check_labelled
from c2r.data.tokens import check_source
from c2r.eval.audit import run_audit
from c2r.eval.autointerp import NEEDED, run_autointerp
from c2r.eval.bench import Bench, Cache, Evaluation, ModelFree, Outcome, Setting
from c2r.eval.core import run_core
from c2r.eval.first_letter_absorption import run_absorption
from c2r.eval.judge import JudgeConfig
from c2r.eval.probing import run_probing
from c2r.eval.recovery import run_recovery
from c2r.eval.results import write_result
from c2r.eval.sae_bench import PREFIX, foreign_suites
from c2r.eval.splitting import run_splitting
from c2r.eval.stability import run_stability
from c2r.interop.sae_bench import check_installed
from c2r.interop.saelens import load_sae
from c2r.sae.base import SAE

Summary = dict[str, float | None]
SUITES: dict[str, Evaluation] = {
    "core": run_core,
    "absorption": run_absorption,
    "splitting": run_splitting,
    "probing": run_probing,
    "autointerp": run_autointerp,
    "audit": run_audit,
} | foreign_suites()
"""Name on the command line → evaluation. A new evaluation is a function and a row."""
MODEL_FREE: dict[str, ModelFree] = {"recovery": run_recovery, "stability": run_stability}
"""The same for those that need no language model; where no other is asked for, none is loaded."""


def evaluate(
    folders: list[Path],
    out: Path | None = None,
    *,
    suites: tuple[str, ...] = ("core", "splitting"),
    model: str | None = None,
    data: dict[str, Any] | None = None,
    tokens: int = 50_000,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    cache: Path | None = None,
    judge: JudgeConfig | None = None,
    probe_data: str | None = None,
    console: Console | None = None,
) -> dict[str, Summary]:
    """Evaluate SAEs that read the same hook point; every result is on disk as soon as it is known.

    Arguments:
        folders: SAE folders, c2r's or SAELens's.
        out: where result files go; None: `evaluations/` beside each SAE folder.
        suites: names in `SUITES` and `MODEL_FREE`.
        model: name of the language model; None: the one each SAE was trained on.
        data: settings of the text (`DataConfig`) that replace those of training. For `stdlib` the held-out part is
            read; other sources have none, which is said.
        tokens: real tokens to evaluate on.
        trust_remote_code: whether code that a model brings may run; an SAE's own word on that is not taken.
        cache: folder for activations; None: `$C2R_CACHE`, or `c2r` in the user's cache folder.
        judge: whom autointerp asks.
        probe_data: labelled texts for "probing", a .jsonl file or a data set; None: the standard library's.

    Returns:
        What the table shows of each SAE, by name.

    Raises:
        ValueError: an unknown suite, a folder that is no SAE, SAEs of different hook points, a model that does not
            fit, or text without tokens; and at the very end, when all other results are written, evaluations that
            failed.
    """
    console = console or Console(stderr=True)
    for suite in suites:
        if suite not in SUITES | MODEL_FREE:
            raise ValueError(f"--suite: got {suite!r}; accepted are {', '.join(SUITES | MODEL_FREE)}")
    if "autointerp" in suites and judge is None:
        raise ValueError(NEEDED)
    if any(suite.startswith(PREFIX) for suite in suites):
        check_installed()
    if tokens < 1:
        raise ValueError(f"--tokens: got {tokens}; accepted are whole numbers ≥ 1")
    if not folders:
        raise ValueError("no SAE folder given")
    if probe_data is not None:
        check_labelled(probe_data)
    chosen_device = pick_device(device)
    names = _names(folders)
    saes = {name: load_sae(folder).to(chosen_device) for name, folder in names.items()}
    settings: dict[str, Any] = {"tokens": tokens, "seed": seed}
    runs: dict[str, Callable[[dict[str, SAE]], Iterator[Outcome]]] = {
        suite: partial(run, Setting(tokens, seed, console)) for suite, run in MODEL_FREE.items()
    }
    if not set(suites) <= set(MODEL_FREE):
        bench = _bench(saes, model, data or {}, tokens, seed, chosen_device, trust_remote_code, cache, console)
        bench.judge, bench.probe_data = judge, probe_data
        settings |= {
            "model": bench.model.model_dump(mode="json"),
            "data": bench.data.model_dump(mode="json"),
            "held_out": bench.data.source == "stdlib",
        }
        runs |= {suite: partial(run, bench) for suite, run in SUITES.items()}
    summaries: dict[str, Summary] = {name: {} for name in names}
    failed: list[str] = []
    for suite in suites:
        for outcome in runs[suite](saes):
            if outcome.error is not None:
                failed.append(f"{outcome.sae}, {outcome.evaluation}: {outcome.error}")
                console.print(f"[red]{escape(failed[-1])}[/]")
                continue
            summaries[outcome.sae] |= outcome.summary
            write_result(
                out or names[outcome.sae].parent / "evaluations",
                evaluation=outcome.evaluation,
                sae_name=outcome.sae,
                sae_config=saes[outcome.sae].config,
                config=settings | outcome.config,
                metrics=outcome.metrics,
                details=outcome.details,
                unstructured=outcome.unstructured | {"summary": outcome.summary},
                file=outcome.file,
            )
    if failed:
        raise ValueError("evaluations failed, the others are written:\n" + "\n".join(f"  {line}" for line in failed))
    return summaries


def _bench(
    saes: dict[str, SAE],
    model: str | None,
    data: dict[str, Any],
    tokens: int,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
    cache: Path | None,
    console: Console,
) -> Bench:
    """Load the language model that all of `saes` read, and find the text.

    Raises:
        ValueError: SAEs of different hook points, or of another width than the model's activations.
    """
    models = {name: model_of(sae.config, model, trust_remote_code) for name, sae in saes.items()}
    first = next(iter(models.values()))
    for name, other in models.items():
        if other != first:
            raise ValueError(f"{name} reads {other}, but {next(iter(models))} reads {first}; evaluate them apart")
    text = data_of(next(iter(saes.values())).config, data)
    check_source(text)
    lm = load_language_model(first, device)
    for name, sae in saes.items():
        if sae.d_in != lm.d_in:
            raise ValueError(f"{name}: the SAE reads activations of width {sae.d_in}, the model's have {lm.d_in}")
    console.print(f"evaluating on {text.path or text.source}, rows of {text.context} tokens", highlight=False)
    if text.source != "stdlib":
        console.print("[yellow]this source keeps no part from training; the text may have been trained on[/]")
    return Bench(lm, first, text, tokens, seed, Cache(cache), console)


def model_of(config: dict[str, Any], name: str | None, trust_remote_code: bool = False) -> ModelConfig:
    """The model and hook point that an SAE reads, from its `cfg.json`; `name` replaces the model's name.

    Raises:
        ValueError: the file says neither in our words nor in SAELens's.
    """
    trust = {"trust_remote_code": trust_remote_code}
    if "c2r" in config and config["c2r"]["model"] is None:
        raise ValueError(
            "the SAE was trained on known features and reads no language model; "
            f"--suite: accepted are {', '.join(MODEL_FREE)}"
        )
    if "c2r" in config:
        given = ModelConfig.model_validate(config["c2r"]["model"] | trust)
        return given if name is None else given.model_copy(update={"name": name, "revision": None})
    metadata = config.get("metadata", {})
    place = str(metadata.get("hook_name", ""))
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)", place)
    name = name or metadata.get("model_name")
    if match is None or name is None:
        raise ValueError(f"cfg.json: cannot tell the hook point from hook_name {place!r} and model_name {name!r}")
    return ModelConfig.model_validate({"name": name, "layer": int(match[1]), "hook": match[2], **trust})


def data_of(config: dict[str, Any], changes: dict[str, Any]) -> DataConfig:
    """The text that an SAE was trained on, or the standard library where its file does not say, with `changes`.

    A change of source keeps nothing of the old one but the length of rows.

    Raises:
        ValueError: the changes do not make a source.
    """
    context = config.get("metadata", {}).get("context_size") or DataConfig().context
    given = config["c2r"]["data"] if "c2r" in config else {"context": context}
    if "source" in changes:
        given = {"context": given["context"]}
    try:
        return DataConfig.model_validate(given | changes)
    except ValidationError as error:
        raise ValueError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from None


def _names(folders: list[Path]) -> dict[str, Path]:
    """A name a folder: its own, with its parent's where that is needed to tell them apart."""
    own = [folder.resolve().name for folder in folders]
    names = own if len(set(own)) == len(own) else [f"{f.resolve().parent.name}_{f.resolve().name}" for f in folders]
    if len(set(names)) < len(names):
        raise ValueError(
            f"SAE folders: {', '.join(map(str, folders))} cannot be told apart by name; evaluate them apart"
        )
    return dict(zip(names, folders, strict=True))
