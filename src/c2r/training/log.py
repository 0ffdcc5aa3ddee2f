"""Logging during training: a progress display, and metrics.jsonl with the data of every training curve."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from c2r.storage import cannot_write
from c2r.training.trackers import Tracker

_QUIET_SECONDS = 20.0
_SHOWN = {"loss": ".4f", "ev": ".3f", "l0": ".1f", "alive": ".2f", "penalty_ratio": ".3f"}
_SHORT = {"penalty_ratio": "C²R/rec", "ev": "EV", "l0": "L0"}


class LogPosition(NamedTuple):
    """The state of the log at a checkpoint."""

    bytes: int = 0
    """Size of metrics.jsonl in bytes."""
    seconds: float = 0.0
    """Training time so far."""


class RunLog:
    """Context manager that logs a run. `step` must be called in every step; it writes every `every`-th.

    Arguments:
        path: path of metrics.jsonl.
        tokens: number of tokens of the whole run.
        every: steps between lines.
        start: position at the checkpoint from which the run resumes; the file is truncated to it.
        trackers: other places to log to.
    """

    def __init__(
        self,
        path: Path,
        tokens: int,
        every: int,
        console: Console,
        *,
        start: LogPosition = LogPosition(),  # noqa: B008 (immutable)
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.path, self.tokens, self.every, self.start, self.trackers = path, tokens, every, start, trackers
        # If the console is not a terminal, `step` prints a line from time to time instead.
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}% {task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=2,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.said: dict[str, float] = {}
        self.file: IO[bytes] | None = None

    def __enter__(self) -> RunLog:
        try:
            self.file = self.path.open("ab")
        except OSError as error:
            raise ValueError(f"output: {cannot_write(self.path, 0, error)}") from error
        if self.file.tell() < self.start.bytes:
            self.progress.console.print(
                f"[yellow]{self.path} is shorter than at the checkpoint; some steps are missing from it[/]"
            )
        self.file.truncate(min(self.start.bytes, self.file.tell()))
        self.progress.start()
        self.began = time.monotonic() - self.start.seconds
        return self

    def position(self) -> LogPosition:
        """Flush the log to disk and return its position."""
        assert self.file is not None
        os.fsync(self.file.fileno())
        return LogPosition(self.file.seek(0, os.SEEK_END), time.monotonic() - self.began)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        for tracker in self.trackers:
            tracker.close()
        if self.file:
            with contextlib.suppress(OSError):  # a full disk has been reported already
                self.file.close()

    def step(self, sae: str, step: int, tokens: int, measured: dict[str, Tensor]) -> None:
        """Show and write the metrics of one SAE in one step; `tokens` is the number of tokens seen so far."""
        seconds, last = time.monotonic() - self.began, tokens >= self.tokens
        if sae not in self.tasks:
            self.tasks[sae] = self.progress.add_task(sae, total=self.tokens, completed=tokens, figures="")
        if step % self.every and not last:
            self.progress.update(self.tasks[sae], completed=tokens)
            return
        figures = {name: value.item() for name, value in measured.items()}
        rate = tokens / max(seconds, 1e-9)
        shown = " ".join(f"{_SHORT.get(name, name)} {figures[name]:{form}}" for name, form in _SHOWN.items())
        self.progress.update(self.tasks[sae], completed=tokens, figures=f"{shown} {rate:,.0f} tok/s")
        if not self.progress.console.is_terminal and (last or seconds - self.said.get(sae, 0.0) > _QUIET_SECONDS):
            self.said[sae] = seconds
            left = seconds * (self.tokens - tokens) / tokens
            self.progress.console.print(
                f"{sae} {tokens:,}/{self.tokens:,} tokens {shown} {rate:,.0f} tok/s, {left / 60:.1f} min left",
                soft_wrap=True,
            )
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._write(
            {"sae": sae, "step": step, "tokens": tokens, "seconds": round(seconds, 3)}
            | {name: finite.get(name) for name in figures}
        )
        for tracker in self.trackers:
            tracker.log(sae, step, {"tokens": tokens, **finite})

    def _write(self, line: dict[str, Any]) -> None:
        assert self.file is not None
        text = (json.dumps(line) + "\n").encode()
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:
            raise ValueError(cannot_write(self.path, len(text), error)) from error
