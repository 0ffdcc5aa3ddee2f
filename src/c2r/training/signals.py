"""Ctrl-C and SIGTERM: the first lets the step under way end, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_NOTICE = b"\nc2r: stopping after this step; once more stops at once, without saving\n"


class Stopped(KeyboardInterrupt):
    """A signal ended training; `status` is the exit status that says so."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class StopSignals:
    """While entered, SIGINT and SIGTERM are noted and heeded where a run can stop; only in the main thread.

    A signal that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = False
        """The signal came twice: nothing is to be saved."""
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While entered no SAE is amid a step, so that a signal stops the run here and now."""
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.number is not None
        self.number = number
        if self.at_once or self._waiting:
            raise Stopped(number)
        os.write(2, _NOTICE)  # what `print` uses may be in use where the signal came
