"""Ctrl-C and SIGTERM: the first stops training after the current step, the second immediately."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_NOTICE = b"\nc2r: stopping after this step; interrupt again to stop immediately, without saving\n"


class Stopped(KeyboardInterrupt):
    """A signal ended training; `status` is the corresponding exit status (128 + signal number)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class StopSignals:
    """While entered, defer SIGINT and SIGTERM to points where a run can stop cleanly; main thread only.

    A signal that the process already ignored stays ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = False
        """Whether a second signal came: stop without saving."""
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
        """Raise Stopped if a signal was received."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While entered, a signal stops the run immediately, since no SAE is in the middle of a step."""
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
        os.write(2, _NOTICE)  # `print` is not safe in a signal handler
