"""Progress display for long tasks: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 20.0


class PlainProgress(Progress):
    """Progress as plain lines, for a log file or a pipe.

    A task prints a line with an estimate of the remaining time after its first update, then at most one line every 20
    seconds, and one at the end if it took longer than that.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True, auto_refresh=False)
        self._began: dict[TaskID, float] = {}
        self._said: dict[TaskID, float] = {}
        self._ended: set[TaskID] = set()

    def add_task(self, *args: Any, **settings: Any) -> TaskID:
        """See `Progress.add_task`; the keyword `unit` names what is counted."""
        task_id = super().add_task(*args, **settings)
        self._began[task_id] = time.monotonic()
        return task_id

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `Progress.advance`."""
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `Progress.update`."""
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        seconds, finished = now - self._began[task_id], bool(task.total) and task.completed >= (task.total or 0)
        first, last = task_id not in self._said, finished and seconds > QUIET_SECONDS
        if not task.completed or task_id in self._ended:
            return
        if not (first or last or now - self._said[task_id] > QUIET_SECONDS):
            return
        self._said[task_id] = now
        if finished:
            self._ended.add(task_id)
        rate = task.completed / max(seconds, 1e-9)
        unit = task.fields.get("unit", "")
        of_total = "" if task.total is None else f"/{task.total:,.0f}"
        line = f"{task.description}: {task.completed:,.0f}{of_total}{unit and f' {unit}'}, "
        line += f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.2g}/s"
        if finished:
            line += f", {_duration(seconds)} in total"
        elif task.total is not None:
            line += f", {_duration((task.total - task.completed) / rate)} left"
        self.console.print(line, highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """Description, bar, percentage and remaining time; plain lines if the console is not a terminal."""
    if not console.is_terminal:
        return PlainProgress(console)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
