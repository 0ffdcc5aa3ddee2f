"""A whole run: one stream of activations, any number of SAEs trained on it, their folders at the end."""

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
from c2r.training.folder import METRICS_FILE, as_written, check_output, check_same, finished, held, prepare_output
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
    """Train the configured SAEs and return the folder of each; a run that stands in the output folder is gone on with.

    Whatever ends training early is raised again after a checkpoint and the SAEs as they are have been saved, with the
    reason in their `cfg.json`. So do the first SIGINT or SIGTERM, once the step under way is done; the second ends at
    once (in the main thread; elsewhere signals are left alone).

    Arguments:
        overwrite: start afresh instead of an earlier run; only what c2r wrote is removed.
        skip_damaged: where the newest checkpoint is damaged, go on from the last that is whole.

    Raises:
        ValueError: anything wrong with the configuration that shows before training, an output folder that holds
            something else or a run of another configuration, text or model, or that cannot be written, a cache that is
            being written, a damaged checkpoint, activations or losses that are
            not finite, text that ends early, a full disk, or too little memory.
        Stopped: a signal (a KeyboardInterrupt).
    """
    console = console or Console(stderr=True)
    with cache_held(config), contextlib.ExitStack() as holding:
        check_data(config)
        check_trackers(config)
        holding.enter_context(held(config.output, console))
        check_output(config, overwrite=overwrite)
        if not overwrite and finished(config):
            console.print(f"{config.output}: this run is finished; --overwrite starts it afresh")
            return {sae.name: config.output / sae.name for sae in config.saes}
        checkpoint = None if overwrite else latest_checkpoint(config.output, skip_damaged=skip_damaged)
        if checkpoint is not None:
            check_same(checkpoint.tree["config"], config)
            console.print(f"going on from {checkpoint.folder}", soft_wrap=True)
        with telling_of_memory(config):
            return _train(config, checkpoint, overwrite, console)


@dataclass
class _Progress:
    """How far a run has come."""

    stream: dict[str, Any]
    """Where its stream stood after the last step."""
    step: int = 0
    tokens: int = 0
    log: LogPosition = field(default_factory=LogPosition)
    whole: bool = True
    """Every SAE is between steps, so that a checkpoint can be made."""

    def done(self, tokens: int, stream: dict[str, Any]) -> None:
        """All SAEs have made a step."""
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
    """The SAEs and how far they are: new ones, or as the checkpoint has them."""
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
    """Batches until all tokens are seen.

    Raises:
        ValueError: the source ends early, or the model emits NaN or infinity, which is kept.
        Stopped: a signal came since the last batch, or while waiting for the next.
    """
    batches = source.stream.batches(config.train.batch, config.train.tokens - at.tokens)
    while at.tokens < config.train.tokens:
        try:
            with signals.waiting():
                x = next(batches, None)
        except BrokenActivations as error:
            file = keep_faulty(config.output, at.step + 1, error.tensors)
            raise ValueError(f"{error} (at step {at.step + 1}; they are in {file})") from error
        if x is None:
            raise ValueError(
                f"data: the source ended after {at.tokens:,} of {config.train.tokens:,} tokens; give more text, or "
                "lower train.tokens"
            )
        at.whole = False
        yield x


def _check_identity(checkpoint: Checkpoint, source: Source) -> None:
    """Refuse to resume on other activations than the run was trained on so far.

    Raises:
        ValueError: each difference on a line.
    """
    found = differences(checkpoint.tree["identity"], source.identity, "was", "is now")
    if found:
        raise ValueError(
            f"cannot resume from {checkpoint.folder}: the activations have changed. Bring back what they were made of, "
            "or start another run in another folder\n" + "\n".join(f"  {line}" for line in found)
        )


def _state(config: RunConfig, at: _Progress, runs: list[Run[Any]], source: Source, log: RunLog) -> dict[str, Any]:
    """What a checkpoint holds."""
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
    """Save what can be of a run that ends early; what is not whole does not keep the rest from it."""
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    console.print(f"[yellow]stopped after {at.tokens:,} of {config.train.tokens:,} tokens; saving[/]")
    if isinstance(error, (MemoryError, RuntimeError)):  # a step that ran out of memory holds its tensors there
        traceback.clear_frames(error.__traceback__)
    for run in runs:
        run.optimizer.zero_grad()
    if at.whole and at.step > 0 and not isinstance(error, CheckpointError):
        with _told(console):
            folder = checkpoints.save(at.step, _state(config, at, runs, source, log))
            console.print(f"saved {folder}; c2r train with the same configuration goes on from there", soft_wrap=True)
    for run in runs:
        with _told(console):
            save_run(run, config, source, console, tokens=at.tokens, stopped=reason)


@contextmanager
def _told(console: Console) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:  # memory that runs out again is a RuntimeError
        console.print(f"[yellow]{escape(str(error))}[/]")


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
