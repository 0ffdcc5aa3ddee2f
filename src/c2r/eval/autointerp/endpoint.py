"""One request to an OpenAI-compatible chat endpoint, tried again where that can help.

The key comes from the environment, is sent as a header and goes nowhere else: no file, no message, no other host. It
travels encrypted, or not beyond this machine, unless the caller allows otherwise.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from c2r.config.evaluations import KEY, Patience

OPENAI_KEY, OPENAI = "OPENAI_API_KEY", "https://api.openai.com/"
LONGEST_WAIT = 300.0
"""Seconds; an endpoint that asks for more is not waited for."""
_FATAL = {
    401: f"the key is not accepted; set {KEY} (the endpoint's key) in the environment",
    403: f"access is refused; the key in {KEY} may be another's, or may not use this model",
    404: "no such address or model; a base address mostly ends in /v1",
    405: "the address takes no such requests; a base address mostly ends in /v1",
}
"""Every other request would meet the same."""
_PASSING = {408, 409, 425, 429}


class JudgeError(RuntimeError):
    """One request failed, further tries included."""


class JudgeDown(RuntimeError):
    """No request can succeed for now; what was answered is kept."""


class Endpoint:
    """A chat endpoint; safe to use from several threads.

    Arguments:
        address: where requests are posted.
        environ: where the key is looked up: `C2R_JUDGE_KEY`; for OpenAI's own address also `OPENAI_API_KEY`. A local
            endpoint may need none.
        key_in_clear: whether a key may be sent to another machine over http, where anyone on the way can read it.

    Raises:
        ValueError: a key that no header can carry, or that would be sent in clear without being allowed to.
    """

    def __init__(
        self, address: str, patience: Patience, environ: Mapping[str, str], *, key_in_clear: bool = False
    ) -> None:
        self.address, self.patience = address, patience
        self.requests = 0
        """Requests that were sent, further tries included."""
        self._key = _key(address, environ)
        here = _is_this_machine(address)
        if self._key and not (here or key_in_clear or urlsplit(address).scheme == "https"):
            raise ValueError(
                f"judge url: {address} is http, and the key in the environment would be sent to another machine in "
                f"clear; accepted are https, or http on this machine. Unset {KEY} if the endpoint needs no key, or "
                "allow it with key_in_clear"
            )
        self._stop, self._lock, self._reason = threading.Event(), threading.Lock(), ""
        handlers: list[Any] = [_NoRedirect]
        if here:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy would be another machine
        self._opener = urllib.request.build_opener(*handlers)

    def stop(self, reason: str = "stopped") -> None:
        """Begin no further request, for the first `reason` that is given; those under way are finished."""
        with self._lock:
            self._reason = self._reason or reason
        self._stop.set()

    def complete(self, body: dict[str, Any]) -> str:
        """The text that the endpoint answers a chat completion's `body` with.

        Raises:
            JudgeError: this request failed.
            JudgeDown: all would (the key, the address); or `stop` was called.
        """
        fault = ""
        for attempt in range(self.patience.attempts):
            if self._stop.is_set():
                raise JudgeDown(self._reason)
            try:
                return self._text(self._post(json.dumps(body).encode()))
            except _Passing as passing:
                fault, asked = str(passing), passing.wait
            wait = max(asked or 0.0, self.patience.first_wait * 2**attempt * random.uniform(0.75, 1.25))
            if wait > LONGEST_WAIT:
                raise JudgeError(f"{fault}; the endpoint asks to wait {wait:.0f} s")
            if attempt + 1 < self.patience.attempts:
                self._stop.wait(wait)
        raise JudgeError(f"{fault} ({self.patience.attempts} tries)")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "c2r"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._lock:
            self.requests += 1
        request = urllib.request.Request(self.address, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.patience.timeout) as response:
                return _read(response, self.patience.timeout)
        except urllib.error.HTTPError as error:
            with error:
                fault = self._fault(error.code, error.headers.get("Retry-After"), _words_of(error))
            raise fault from None
        except urllib.error.URLError as error:
            raise _Passing(self._clean(f"no connection: {error.reason}")) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(self._clean(f"connection lost: {error or type(error).__name__}")) from None

    def _fault(self, status: int, retry_after: str | None, words: str) -> Exception:
        if status in _FATAL:  # without the endpoint's own words: they may repeat parts of the key
            return JudgeDown(f"status {status} from {self.address}: {_FATAL[status]}")
        if 300 <= status < 400:
            return JudgeDown(f"status {status} from {self.address}: it points elsewhere, which is not followed")
        message = self._clean(f"status {status}: {words}")
        return _Passing(message, _seconds(retry_after)) if status in _PASSING or status >= 500 else JudgeError(message)

    def _text(self, raw: bytes) -> str:
        try:
            answer = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            start = raw[:80].decode(errors="replace")
            raise JudgeError(self._clean(f"the answer is not a chat completion: {start!r}")) from None
        if not isinstance(answer, str) or not answer.strip():
            raise JudgeError("the answer has no text")
        return self._clean(answer)

    def _clean(self, text: str) -> str:
        """`text` without the key, which an endpoint may repeat; a key as short as `EMPTY` is none."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


class _Passing(Exception):
    """A fault that may be gone the next time."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_this_machine(address: str) -> bool:
    """Whether requests do not leave this machine: localhost, or an address of the loopback interface."""
    host = (urlsplit(address).hostname or "").rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _key(address: str, environ: Mapping[str, str]) -> str:
    for name in (KEY, OPENAI_KEY) if address.startswith(OPENAI) else (KEY,):
        key = environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{name}: the key in the environment holds characters that no header can carry")
        if key:
            return key
    return ""


def _read(response: http.client.HTTPResponse, timeout: float) -> bytes:
    """The whole body, within `timeout` seconds also where it comes in drops."""
    end, parts = time.monotonic() + timeout, []
    while part := response.read1(65536):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError("the answer took too long")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _words_of(error: urllib.error.HTTPError) -> str:
    """What the endpoint says of a fault, in one line."""
    try:
        raw = error.read(4096)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        said = json.loads(raw)["error"]
        words = str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        words = raw.decode(errors="replace")
    return " ".join(words.split())[:300]


def _seconds(retry_after: str | None) -> float | None:
    """What Retry-After asks for, in either of its forms; None where it is absent or senseless."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
