"""A complete training run: one stream of activations, any number of SAEs trained on it, one folder per SAE.

B tokens in a batch · D width of the activations.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from c2r.activations.look import say_looks
from c2r.activations.reader import BrokenActivations
from c2r.config.hooks import HookPoint
from c2r.config.run import RunConfig
from c2r.config.saes import SAEConfig
from c2r.identity import differences
from c2r.layout import METRICS_FILE
from c2r.machine import pick_device
from c2r.memory import give_freed_memory_back, keep_freed_memory
from c2r.sae.model import SAE
from c2r.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    latest_checkpoint,
    rng_state,
    set_rng_state,
)
from c2r.training.consistency import margin_of
from c2r.training.faults import check_disk, check_loss, check_room, check_weights, keep_faulty, telling_of_memory
from c2r.training.folder import as_written, check_output, check_same, finished, held, prepare_output
from c2r.training.log import LogPosition, RunLog
from c2r.training.precision import check_selection, precision_lines
from c2r.training.run import Run
from c2r.training.save import save_run
from c2r.training.signals import StopSignals
from c2r.training.source import Source, cache_held, check_data, open_source
from c2r.training.trackers import check_trackers, open_trackers
from c2r.training.warm_start import check_start, starting_weights


def train(
    config: RunConfig, *, overwrite: bool = False, skip_damaged: bool = False, console: Console | None = None
) -> dict[str, Path]:
    """Train the configured SAEs and return the folder of each; an interrupted run in the output folder resumes.

    If an error ends training early, a checkpoint and the SAEs in their current state are saved, with the reason in
    their `cfg.json`, and the error is raised again. The first SIGINT or SIGTERM does the same after the current step;
    the second stops immediately. Signals are handled only in the main thread.

    Arguments:
        overwrite: delete an earlier run and start over; only what c2r wrote is deleted.
        skip_damaged: if the newest checkpoint is corrupt, resume from the most recent intact one.

    Raises:
        ValueError: a configuration error, an output folder that cannot be written or contains other files or a run
            with another configuration, text or model, a cache that is being written, a corrupt checkpoint, NaN or
            infinity in activations or losses, too little text, a full disk, or too little memory.
        Stopped: a signal stopped the run (a KeyboardInterrupt).
    """
    console = console or Console(stderr=True)
    with cache_held(config), contextlib.ExitStack() as holding:
        check_data(config)
        check_trackers(config)
        holding.enter_context(held(config.output, console))
        check_output(config, overwrite=overwrite)
        if not overwrite and finished(config):
            console.print(f"{config.output}: this run is complete; `c2r train --overwrite` starts it over")
            return {sae.name: config.output / sae.name for sae in config.saes}
        checkpoint = None if overwrite else latest_checkpoint(config.output, skip_damaged=skip_damaged)
        if checkpoint is not None:
            check_same(checkpoint.tree["config"], config)
            console.print(f"resuming from {checkpoint.folder}", soft_wrap=True)
        with telling_of_memory(config):
            return _train(config, checkpoint, overwrite, console)


@dataclass
class _Progress:
    """How far a run has progressed."""

    stream: dict[str, Any]
    """State of the stream after the last step."""
    step: int = 0
    tokens: int = 0
    log: LogPosition = field(default_factory=LogPosition)
    whole: bool = True
    """Whether all SAEs have made the same number of steps, so that a checkpoint can be written."""

    def done(self, tokens: int, stream: dict[str, Any]) -> None:
        """Record that all SAEs have made a step on a batch of `tokens`."""
        self.step, self.tokens, self.stream, self.whole = self.step + 1, self.tokens + tokens, stream, True


def _train(config: RunConfig, checkpoint: Checkpoint | None, overwrite: bool, console: Console) -> dict[str, Path]:
    starts = {sae.name: None if checkpoint else check_start(sae, config, console) for sae in config.saes}
    device = pick_device(config.train.device)
    check_selection(config.train, device)
    if device.type == "cpu":
        keep_freed_memory()
    source = open_source(config, device, console)
    try:
        check_room(config, source.d_in, device)
        if checkpoint is not None:
            _check_identity(checkpoint, source)
        for sae in config.saes:
            margin_of(sae, source.d_in)
        at, runs = _begin(config, checkpoint, source, starts, device, console)
        if checkpoint is None:
            looks = {point.name: look for point, look in source.stream.look.items()}
            say_looks(looks, config.stream.max_norm_multiple, console)
        check_disk(config, runs)
        prepare_output(config, overwrite=overwrite, console=console)
        checkpoints, trackers = Checkpoints(config.output, config.train), open_trackers(config, at.step)
        path, every = config.output / METRICS_FILE, config.train.log_every
        with (
            RunLog(path, config.train.tokens, every, console, start=at.log, trackers=trackers) as log,
            StopSignals() as signals,
        ):
            try:
                for x in _batches(source, config, at, signals):
                    tokens = len(next(iter(x.values())))
                    for run in runs:
                        x_BD = x[config.point(run.config)]
                        measured = run.step(x_BD)
                        check_loss(run, measured["loss"], x_BD, config)
                        log.step(run.config.name, run.step_number, at.tokens + tokens, measured)
                    at.done(tokens, source.stream.state_dict())
                    if checkpoints.due(at.step):
                        checkpoints.save(at.step, _state(config, at, runs, source, log))
                        give_freed_memory_back()
            except BaseException as error:
                if not signals.at_once:
                    _keep(error, config, at, runs, source, log, checkpoints, console)
                raise
        return {run.config.name: save_run(run, config, source, console, tokens=at.tokens) for run in runs}
    finally:
        source.stream.close()
        if (report := source.skipped.report) is not None:
            console.print(f"[yellow]{report}[/]")


def _begin(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    source: Source,
    starts: dict[str, SAE | None],
    device: torch.device,
    console: Console,
) -> tuple[_Progress, list[Run[Any]]]:
    """The run's progress and its SAEs: new, or restored from the checkpoint."""
    stream = source.stream
    state = None if checkpoint is None else checkpoint.state()
    if state is not None:
        stream.load_state_dict(state["stream"])
    scale = {sae.name: stream.scale[config.point(sae)] for sae in config.saes}
    runs = [_new_run(sae, starts[sae.name], config, source.d_in, scale[sae.name], device) for sae in config.saes]
    began = {} if state is None else state["saes"]
    for run in runs:
        if run.config.name in began:
            run.load_state_dict(began[run.config.name])
    for line in precision_lines({run.config.name: run.precision for run in runs}, began):
        console.print(escape(line), soft_wrap=True)
    if state is None:
        return _Progress(stream.state_dict()), runs
    set_rng_state(state["rng"], device)
    return _Progress(state["stream"], state["step"], state["tokens"], LogPosition(**state["log"])), runs


def _batches(
    source: Source, config: RunConfig, at: _Progress, signals: StopSignals
) -> Iterator[dict[HookPoint, Tensor]]:
    """Batches of activations by hook point, until `train.tokens` tokens have been seen.

    Raises:
        ValueError: the source ends early, or activations contain NaN or infinity (they are saved to a file).
        Stopped: a signal was received since the last batch or while waiting for the next.
    """
    batches = source.stream.batches(config.train.batch, config.train.tokens - at.tokens)
    while at.tokens < config.train.tokens:
        try:
            with signals.waiting():
                x = next(batches, None)
        except BrokenActivations as error:
            file = keep_faulty(config.output, at.step + 1, error.tensors)
            raise ValueError(f"{error} (at step {at.step + 1}; saved: {file})") from error
        if x is None:
            raise ValueError(
                f"data: the source ended after {at.tokens:,} of {config.train.tokens:,} tokens; add more text, or "
                "lower train.tokens"
            )
        at.whole = False
        yield x


def _check_identity(checkpoint: Checkpoint, source: Source) -> None:
    """Refuse to resume if the activations differ from those the run was trained on so far.

    Raises:
        ValueError: they differ; lists the differences, one per line.
    """
    found = differences(checkpoint.tree["identity"], source.identity, "was", "is now")
    if found:
        raise ValueError(
            f"cannot resume from {checkpoint.folder}: the activations have changed. Restore the original text and "
            "model, or start a new run in another folder\n" + "\n".join(f"  {line}" for line in found)
        )


def _state(config: RunConfig, at: _Progress, runs: list[Run[Any]], source: Source, log: RunLog) -> dict[str, Any]:
    """The content of a checkpoint."""
    for run in runs:
        check_weights(run)
    return {
        "config": as_written(config),
        "identity": source.identity,
        "step": at.step,
        "tokens": at.tokens,
        "stream": at.stream,
        "log": log.position()._asdict(),
        "rng": rng_state(runs[0].sae.W_dec.device),
        "saes": {run.config.name: run.state_dict() for run in runs},
    }


def _keep(
    error: BaseException, config: RunConfig, at: _Progress, runs: list[Run[Any]], source: Source, log: RunLog,
    checkpoints: Checkpoints, console: Console,
) -> None:  # fmt: skip
    """Save as much as possible of a run that ends early; if one thing cannot be saved, the others still are."""
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    console.print(f"[yellow]stopped after {at.tokens:,} of {config.train.tokens:,} tokens; saving the SAEs[/]")
    if isinstance(error, (MemoryError, RuntimeError)):  # the traceback keeps the failed step's tensors alive
        traceback.clear_frames(error.__traceback__)
    for run in runs:
        run.optimizer.zero_grad()
    if at.whole and at.step > 0 and not isinstance(error, CheckpointError):
        with _told(console):
            folder = checkpoints.save(at.step, _state(config, at, runs, source, log))
            console.print(f"saved {folder}; run the same command again to resume from it", soft_wrap=True)
    for run in runs:
        with _told(console):
            save_run(run, config, source, console, tokens=at.tokens, stopped=reason)


@contextmanager
def _told(console: Console) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:  # out of memory is a RuntimeError
        console.print(f"[yellow]{escape(str(error))}[/]")


def _new_run(
    sae: SAEConfig, start: SAE | None, config: RunConfig, d_in: int, scale: float, device: torch.device
) -> Run[Any]:
    if start is not None and start.d_in != d_in:
        raise ValueError(
            f"saes.{sae.name}.init: {sae.init} expects activations of width {start.d_in}, but the model has {d_in}"
        )
    if start is not None:
        start = starting_weights(start, sae, 1 / scale)
    return Run(sae, config.train, d_in, seed=config.seed, device=device, start=start)
