"""The judge, a language model behind an endpoint. Answers are kept on disk, so that a rerun does not ask again."""

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
"""After this number of consecutive failed requests, the endpoint is considered down."""


def endpoint_of(config: JudgeConfig, environ: Mapping[str, str] = os.environ) -> Endpoint:
    """The judge's endpoint.

    Raises:
        ValueError: see `Endpoint`.
    """
    return Endpoint(config.address, config.patience, environ, key_in_clear=config.key_in_clear)


class Judge:
    """Asks the language model, and stores its answers; thread-safe.

    Arguments:
        folder: where answers are stored, one file per request, named by a hash of the request.
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
            return None  # missing or damaged
        return answer if isinstance(answer, str) else None

    def ask(self, messages: Messages) -> str:
        """The answer's text, from disk or from the endpoint.

        Raises:
            JudgeError: this request failed.
            JudgeDown: all requests would fail, the last `FAILURES_IN_A_ROW` did, or `stop` was called.
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
                self.stop(f"{failures} requests in a row failed, the last one with: {error}")
            raise
        with self._lock:
            self._failures = 0
        write_json(self._path(messages), {"request": self._body(messages), "answer": answer})
        return answer

    def stop(self, reason: str = "stopped") -> None:
        """Send no further requests; pending ones finish and are stored. The first `reason` is reported."""
        self.endpoint.stop(reason)

    def _body(self, messages: Messages) -> dict[str, Any]:
        return {**self.config.options, "model": self.config.model, "messages": messages}

    def _path(self, messages: Messages) -> Path:
        key = json.dumps([self.config.address, self._body(messages)], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
