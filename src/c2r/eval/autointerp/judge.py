"""A language model that judges; what it answered is kept on disk, so that a rerun asks nothing again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from c2r.eval.autointerp.endpoint import KEY, Endpoint, JudgeDown, JudgeError, Patience
from c2r.eval.results import write_json

Messages = list[dict[str, str]]
FAILURES_IN_A_ROW = 10
"""So many requests that failed for good, none answered between them, and the endpoint counts as down."""


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge is asked, for how much.

    Raises:
        ValueError: a setting that cannot be used; the message names its flag.
    """

    url: str
    """Base address of the endpoint, such as https://api.openai.com/v1."""
    model: str
    latents: int = 100
    """Latents of an SAE to be judged, two requests each."""
    max_requests: int | None = None
    """What would take more is refused before the first; None has no limit."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as temperature or reasoning_effort."""
    workers: int = 8
    """Requests under way at once."""
    patience: Patience = field(default_factory=Patience)
    key_in_clear: bool = False
    """Whether the key may be sent to another machine over http, where anyone on the way can read it."""

    def __post_init__(self) -> None:
        try:
            address = urlsplit(self.url)
            usable = address.scheme in ("http", "https") and bool(address.hostname)
            usable &= not (address.username or address.password or address.query or address.fragment)
        except ValueError:
            usable = False
        if not usable:  # the address is not repeated: it may hold a key
            raise ValueError(
                "--judge-url: accepted are http:// and https:// addresses such as https://api.openai.com/v1, without "
                f"user, query or fragment; a key goes into {KEY} in the environment"
            )
        if not self.model:
            raise ValueError("--judge-model: nothing given; accepted is the judge's name at the endpoint")
        for name, value in (("judge-latents", self.latents), ("max-requests", self.max_requests)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}: got {value}; accepted are whole numbers ≥ 1")
        if taken := {"model", "messages", "stream", "n"}.intersection(self.options):
            raise ValueError(f"--judge-options: got {', '.join(sorted(taken))}; accepted are other fields of a request")

    @property
    def address(self) -> str:
        """Where requests are posted."""
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def judge_of(
    url: str | None,
    model: str | None,
    latents: int,
    options: str | None,
    max_requests: int | None,
    key_in_clear: bool = False,
) -> JudgeConfig | None:
    """The judge that the command line names; None where it names none.

    Raises:
        ValueError: half a judge, or see `JudgeConfig`.
    """
    if url is None and model is None:
        return None
    try:
        fields = json.loads(options or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f'--judge-options: got {options!r}; accepted is a JSON object such as {{"temperature": 0}}')
    return JudgeConfig(url or "", model or "", latents, max_requests, fields, key_in_clear=key_in_clear)


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
