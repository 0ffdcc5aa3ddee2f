"""A whole run: one stream of activations, any number of SAEs trained on it, their folders at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape

from c2r.config import RunConfig
from c2r.data.harvest import pick_device
from c2r.interop.saelens import save_sae
from c2r.methods import RESERVED, SAEConfig
from c2r.penalty import lambda_of_strength, strength_of_lambda
from c2r.sae.base import SAE
from c2r.train.log import RunLog
from c2r.train.memory import keep_freed_memory
from c2r.train.run import Run
from c2r.train.source import Source, Stream, check_data, open_source
from c2r.train.start import check_start, starting_weights

RUN_FILE, METRICS_FILE = "run.yaml", "metrics.jsonl"
RUN_MARK = "# Written by c2r: the configuration of the run in this folder.\n"
"""First line of a recorded configuration; a folder without it is not ours to overwrite."""


def train(config: RunConfig, *, overwrite: bool = False, console: Console | None = None) -> dict[str, Path]:
    """Train the configured SAEs and return the folder of each.

    Whatever ends training early, Ctrl-C included, is raised again after the SAEs have been saved as they are, with
    the reason in their `cfg.json`.

    Raises:
        ValueError: anything wrong with the configuration that shows before training, an output folder that holds
            something else, or activations or losses that are not finite.
    """
    console = console or Console(stderr=True)
    check_data(config)
    starts = {sae.name: check_start(sae) for sae in config.saes}
    check_output(config.output, overwrite)
    device = pick_device(config.train.device)
    keep_freed_memory()
    source = open_source(config, device, console)
    stream = source.stream
    scale = {sae.name: stream.scale[config.point(sae)] for sae in config.saes}
    runs = [_new_run(sae, starts[sae.name], config, source.d_in, scale[sae.name], device) for sae in config.saes]
    _prepare_output(config)
    state: dict[str, Any] = {"tokens": 0, "stopped": None}
    with RunLog(config.output / METRICS_FILE, config.train.tokens, config.train.log_every, console) as log:
        try:
            for tokens, run, measured in _steps(runs, stream, config):
                state["tokens"] = tokens
                log.step(run.config.name, run.step_number, tokens, measured, last=tokens >= config.train.tokens)
        except BaseException as error:
            state["stopped"] = f"{type(error).__name__}: {error}".rstrip(": ")
            console.print(f"[yellow]stopped after {state['tokens']:,} of {config.train.tokens:,} tokens; saving[/]")
            _save_what_can_be(runs, config, source, state, console)
            raise
        finally:
            stream.close()
    return {run.config.name: _save(run, config, source, state, console) for run in runs}


def _steps(
    runs: list[Run[Any]], stream: Stream, config: RunConfig
) -> Iterator[tuple[int, Run[Any], dict[str, torch.Tensor]]]:
    """Every SAE's step on every batch, with the tokens seen so far."""
    done = 0
    points = [config.point(run.config) for run in runs]
    for x in stream.batches(config.train.batch, config.train.tokens):
        done += len(x[points[0]])
        for run, point in zip(runs, points, strict=True):
            measured = run.step(x[point])
            if not torch.isfinite(measured["loss"]):
                raise ValueError(
                    f"saes.{run.config.name}: the loss is {measured['loss'].item()} at step {run.step_number}; "
                    f"a lower train.lr (now {config.train.lr}) may help"
                )
            yield done, run, measured


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but a run of c2r's that may be overwritten; make it where it is not.

    Raises:
        ValueError: says what is there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: cannot make the folder {output}: {error.strerror}") from error
    foreign = sorted(path.name for path in output.iterdir() if not _is_ours(path))
    if foreign:
        raise ValueError(
            f"output: {output} holds something else ({', '.join(foreign[:5])}); give a new or empty folder"
        )
    if any(output.iterdir()) and not overwrite:
        raise ValueError(f"output: {output} holds an earlier run; give another folder, or --overwrite to replace it")


def _is_ours(path: Path) -> bool:
    """Whether c2r wrote this into a run's folder: only that is ever overwritten."""
    try:
        if path.name == RUN_FILE:
            return path.read_text(encoding="utf-8").startswith(RUN_MARK)
        if (path / "cfg.json").is_file():
            return "c2r" in json.loads((path / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return path.name in RESERVED


def _prepare_output(config: RunConfig) -> None:
    """Clear what an earlier run left (`check_output` allowed it) and record the configuration as it was written."""
    for path in config.output.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    written = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    text = RUN_MARK + yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    (config.output / RUN_FILE).write_text(text, encoding="utf-8")


def _save_what_can_be(
    runs: list[Run[Any]], config: RunConfig, source: Source, state: dict[str, Any], console: Console
) -> None:
    """Save each SAE that is whole; one that is not does not keep the others from it."""
    for run in runs:
        try:
            _save(run, config, source, state, console)
        except ValueError as error:
            console.print(f"[yellow]{escape(str(error))}[/]")


def _save(run: Run[Any], config: RunConfig, source: Source, state: dict[str, Any], console: Console) -> Path:
    folder = config.output / run.config.name
    metadata = source.metadata_of(run.config) | {"training_architecture": run.config.method}
    point = config.point(run.config)
    scale, median_norm = source.stream.scale[point], source.stream.median_norm[point]
    ours = {
        "model": source.model_of(run.config),
        "seed": config.seed,
        "data": config.data.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "sae": run.config.model_dump(mode="json", by_alias=True),
        "state": {**state, "scale": scale, "median_norm": median_norm, **_both_units(run, config)},
    }
    save_sae(run.export(scale), folder, metadata=metadata, c2r=ours)
    console.print(f"saved {folder}")
    return folder


def _both_units(run: Run[Any], config: RunConfig) -> dict[str, float]:
    """C²R's strength in both units, whichever was given."""
    c2r, shape = run.config.c2r, {"batch": config.train.batch, "width": run.config.width}
    if c2r is None:
        return {}
    if c2r.lam is not None:
        return {"lambda": c2r.lam, "strength": strength_of_lambda(c2r.lam, alpha=c2r.alpha, **shape)}
    strength = c2r.strength or 0.0
    return {"lambda": lambda_of_strength(strength, alpha=c2r.alpha, **shape), "strength": strength}


def _new_run(
    sae: SAEConfig, start: SAE | None, config: RunConfig, d_in: int, scale: float, device: torch.device
) -> Run[Any]:
    if start is not None and start.d_in != d_in:
        raise ValueError(
            f"saes.{sae.name}.init: {sae.init} reads activations of width {start.d_in}, the model's have {d_in}"
        )
    if start is not None:
        start = starting_weights(start, sae, 1 / scale)
    return Run(sae, config.train, d_in, seed=config.seed, device=device, start=start)
