"""A language model that judges; what it answered is kept on disk, so that a rerun asks nothing again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from c2r.config.evaluations import JudgeConfig
from c2r.eval.autointerp.endpoint import Endpoint, JudgeDown, JudgeError
from c2r.eval.results import write_json

Messages = list[dict[str, str]]
FAILURES_IN_A_ROW = 10
"""So many requests that failed for good, none answered between them, and the endpoint counts as down."""


def endpoint_of(config: JudgeConfig, environ: Mapping[str, str] = os.environ) -> Endpoint:
    """The judge's endpoint.

    Raises:
        ValueError: see `Endpoint`.
    """
    return Endpoint(config.address, config.patience, environ, key_in_clear=config.key_in_clear)


class Judge:
    """Asks and remembers; safe to use from several threads.

    Arguments:
        folder: where answers are kept, a file each, under a key of all that was asked.
        environ: see `Endpoint`.
    """

    def __init__(self, config: JudgeConfig, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.config, self.folder = config, folder
        self.endpoint = endpoint_of(config, environ)
        self._lock, self._failures = threading.Lock(), 0

    def known(self, messages: Messages) -> str | None:
        """The answer on disk, or None."""
        try:
            answer = json.loads(self._path(messages).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, LookupError, TypeError):
            return None  # not there, or damaged
        return answer if isinstance(answer, str) else None

    def ask(self, messages: Messages) -> str:
        """The answer's text, from disk or from the endpoint.

        Raises:
            JudgeError: this request failed.
            JudgeDown: all would, `FAILURES_IN_A_ROW` did before, or `stop` was called.
        """
        answer = self.known(messages)
        if answer is not None:
            return answer
        try:
            answer = self.endpoint.complete(self._body(messages))
        except JudgeDown as down:
            self.stop(str(down))
            raise
        except JudgeError as error:
            with self._lock:
                self._failures += 1
                failures = self._failures
            if failures >= FAILURES_IN_A_ROW:
                self.stop(f"{failures} requests in a row failed, the last with: {error}")
            raise
        with self._lock:
            self._failures = 0
        write_json(self._path(messages), {"request": self._body(messages), "answer": answer})
        return answer

    def stop(self, reason: str = "stopped") -> None:
        """Begin no further request, for the first `reason` that is given; those under way are finished and kept."""
        self.endpoint.stop(reason)

    def _body(self, messages: Messages) -> dict[str, Any]:
        return {**self.config.options, "model": self.config.model, "messages": messages}

    def _path(self, messages: Messages) -> Path:
        key = json.dumps([self.config.address, self._body(messages)], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
