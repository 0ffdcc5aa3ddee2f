"""Evaluate SAE folders: the model loaded once, every SAE on the same text, one JSON an evaluation and SAE."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from c2r.config import DataConfig, ModelConfig
from c2r.data.harvest import load_language_model, pick_device
from c2r.data.tokens import Rows, check_source, packed_rows
from c2r.eval.core import CoreResult, evaluate_core
from c2r.eval.results import write_result
from c2r.interop.saelens import load_sae

SUITES = ("core",)


def evaluate(
    folders: list[Path],
    out: Path | None = None,
    *,
    suites: tuple[str, ...] = ("core",),
    model: str | None = None,
    data: dict[str, Any] | None = None,
    tokens: int = 50_000,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> dict[str, CoreResult]:
    """Evaluate SAEs that read the same hook point.

    Arguments:
        folders: SAE folders, c2r's or SAELens's.
        out: where result files go; None: `evaluations/` beside each SAE folder.
        model: name of the language model; None: the one each SAE was trained on.
        data: settings of the text (`DataConfig`) that replace those of training. For `stdlib` the held-out part is
            read; other sources have none, which is said.
        tokens: real tokens to evaluate on.
        trust_remote_code: whether code that a model brings may run; an SAE's own word on that is not taken.

    Raises:
        ValueError: an unknown suite, a folder that is no SAE, SAEs of different hook points, a model that does not
            fit, or text without tokens.
    """
    console = console or Console(stderr=True)
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"--suite: got {suite!r}; accepted are {', '.join(SUITES)}")
    if tokens < 1:
        raise ValueError(f"--tokens: got {tokens}; accepted are whole numbers ≥ 1")
    if not folders:
        raise ValueError("no SAE folder given")
    chosen_device = pick_device(device)
    saes = {name: load_sae(folder).to(chosen_device) for name, folder in _names(folders).items()}
    models = {name: model_of(sae.config, model, trust_remote_code) for name, sae in saes.items()}
    first = next(iter(models.values()))
    for name, other in models.items():
        if other != first:
            raise ValueError(f"{name} reads {other}, but {next(iter(models))} reads {first}; evaluate them apart")
    text = data_of(next(iter(saes.values())).config, data or {})
    check_source(text)
    lm = load_language_model(first, chosen_device)
    console.print(f"evaluating on {text.path or text.source}, rows of {text.context} tokens", highlight=False)
    if text.source != "stdlib":
        console.print("[yellow]this source keeps no part from training; the text may have been trained on[/]")
    # Logits are the largest thing here: rows so many that a batch of them has at most 2²⁶ numbers.
    vocabulary = lm.model.config.get_text_config().vocab_size
    size = max(1, min(16, 2**26 // (text.context * vocabulary)))
    rows = packed_rows(text, lm.tokenizer, seed=seed, held_out=True, rows=size)
    with _progress(console) as progress:
        task = progress.add_task("core evaluation", total=tokens)
        results = evaluate_core(
            lm, saes, _until(rows, tokens), progress=lambda count: progress.update(task, advance=count)
        )
    seen = next(iter(results.values())).core["token_stats"]["total_tokens_eval_sparsity_variance"]
    if seen < tokens:
        console.print(f"[yellow]the text ended after {seen:,} of {tokens:,} tokens[/]")
    settings = {
        "model": first.model_dump(mode="json"),
        "data": text.model_dump(mode="json"),
        "held_out": text.source == "stdlib",
        "tokens": seen,
        "seed": seed,
    }
    for (name, folder), result in zip(_names(folders).items(), results.values(), strict=True):
        where = out or folder.parent / "evaluations"
        common: dict[str, Any] = {"sae_name": name, "sae_config": saes[name].config, "config": settings}
        drawn = dict(result.histograms)
        density = {"log10_density": drawn.pop("log10_density")}
        write_result(where, evaluation="core", metrics=result.core, unstructured=density, **common)
        write_result(
            where, evaluation="splitting", metrics={"splitting": result.splitting}, unstructured=drawn, **common
        )
    return results


def model_of(config: dict[str, Any], name: str | None, trust_remote_code: bool = False) -> ModelConfig:
    """The model and hook point that an SAE reads, from its `cfg.json`; `name` replaces the model's name.

    Raises:
        ValueError: the file says neither in our words nor in SAELens's.
    """
    trust = {"trust_remote_code": trust_remote_code}
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


def _until(rows: Iterator[Rows], tokens: int) -> Iterator[Rows]:
    """Rows until `tokens` real ones have passed."""
    seen = 0
    for part in rows:
        yield part
        seen += int(part.real.sum())
        if seen >= tokens:
            return


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        console=console,
    )
