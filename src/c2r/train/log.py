"""What a run tells while it trains: a progress display, and metrics.jsonl, from which every curve can be redrawn."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

_QUIET_SECONDS = 20.0
_SHOWN = {"loss": ".4f", "ev": ".3f", "l0": ".1f", "alive": ".2f", "penalty_ratio": ".3f"}
_SHORT = {"penalty_ratio": "C²R/rec", "ev": "EV", "l0": "L0"}


class RunLog:
    """Context of a training run; `step` is called once a step and writes every `every`-th."""

    def __init__(self, path: Path, tokens: int, every: int, console: Console) -> None:
        self.path, self.tokens, self.every = path, tokens, every
        # A log file gets a line now and then in place of the display.
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
        self.file: IO[str] | None = None

    def __enter__(self) -> RunLog:
        self.file = self.path.open("w", encoding="utf-8")
        self.progress.start()
        self.began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.file:
            self.file.close()

    def step(self, sae: str, step: int, tokens: int, measured: dict[str, Tensor], *, last: bool) -> None:
        """Show and write what one SAE measured in a step; `tokens` counts the run so far."""
        seconds = time.monotonic() - self.began
        if sae not in self.tasks:
            self.tasks[sae] = self.progress.add_task(sae, total=self.tokens, figures="")
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
        if self.file:
            finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            line = {"sae": sae, "step": step, "tokens": tokens, "seconds": round(seconds, 3), **finite}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
