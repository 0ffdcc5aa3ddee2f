"""A thread that reads ahead of whoever consumes, with a bound."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Sized)

_POLL = 0.2
"""Seconds between looks at whether the other side still lives; a Ctrl-C waits no longer."""


class Ahead(Generic[Item]):
    """Parts of an iterator that runs in a thread of its own.

    At most `tokens` tokens wait (one part where a part has more), beside the part that the thread is making.

    Arguments:
        parts: makes the iterator; called in the thread.
        tokens: the bound.
        name: of the thread.
        start: whether the thread begins at once. An owner that must be able to stop it whatever happens first keeps the
            object and then calls `start`: a signal may come between the two.
    """

    def __init__(
        self, parts: Callable[[], Iterator[Item]], tokens: int, name: str = "c2r reader", *, start: bool = True
    ) -> None:
        self._parts, self._bound = parts, tokens
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._held, self._finished, self._stopped = 0, False, False
        self._error: BaseException | None = None
        # A daemon, so that a model that hangs cannot keep the process alive; `close` is what ends it in order.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Begin, unless it was stopped before."""
        with self._changed:
            if not self._stopped:
                self._thread.start()

    def take(self) -> Item | None:
        """The next part; None when there is no more.

        Raises:
            whatever the iterator raised, once all parts before it are taken.
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
        """Drop what waits and end the thread; it lasts as long as the part that it is making, here at most 10 s."""
        self.stop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def stop(self) -> None:
        """As `close`, without waiting for the thread's end."""
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
