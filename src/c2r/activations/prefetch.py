"""A thread that reads ahead of its consumer, up to a limit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Sized)

_POLL = 0.2
"""Seconds between checks whether the other side is still alive; Ctrl-C is handled at least that often."""


class Ahead(Generic[Item]):
    """Runs an iterator in a background thread and serves its parts.

    At most `tokens` tokens are queued (or a single part, if it has more), besides the part being produced.

    Arguments:
        parts: creates the iterator; called in the thread.
        tokens: the limit.
        name: name of the thread.
        start: start the thread immediately. An owner that must always be able to stop it stores the object first and
            then calls `start`, because a signal may arrive in between.
    """

    def __init__(
        self, parts: Callable[[], Iterator[Item]], tokens: int, name: str = "c2r reader", *, start: bool = True
    ) -> None:
        self._parts, self._bound = parts, tokens
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._held, self._finished, self._stopped = 0, False, False
        self._error: BaseException | None = None
        # A daemon, so that a hanging model cannot keep the process alive; `close` ends the thread in an orderly way.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Start the thread, unless `stop` was called before."""
        with self._changed:
            if not self._stopped:
                self._thread.start()

    def take(self) -> Item | None:
        """The next part; None if there are no more.

        Raises:
            any error of the iterator, after all earlier parts have been taken.
        """
        with self._changed:
            while not (self._waiting or self._finished or self._stopped):
                self._changed.wait(_POLL)
            if not self._waiting:
                if self._error is not None:
                    raise self._error
                return None
            part = self._waiting.popleft()
            self._held -= len(part)
            self._changed.notify_all()
            return part

    def close(self) -> None:
        """Discard queued parts and end the thread, waiting at most 10 s for the part being produced."""
        self.stop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def stop(self) -> None:
        """Like `close`, but without waiting for the thread to end."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._held = 0
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for part in self._parts():
                with self._changed:
                    while not self._stopped and self._waiting and self._held + len(part) > self._bound:
                        self._changed.wait(_POLL)
                    if self._stopped:
                        return
                    self._waiting.append(part)
                    self._held += len(part)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()
