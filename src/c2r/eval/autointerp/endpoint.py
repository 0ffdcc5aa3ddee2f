"""Requests to an OpenAI-compatible chat endpoint, with retries.

The API key is read from the environment and only ever sent as a header to the endpoint: it is not written to files or
messages and not sent to other hosts. Unless the caller allows it, it is not sent unencrypted to another machine.
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
"""Seconds; if an endpoint asks to wait longer, the request fails."""
_FATAL = {
    401: f"the API key was rejected; set {KEY} in the environment to the endpoint's key",
    403: f"access was refused; the key in {KEY} may belong to another endpoint, or may not have access to this model",
    404: "address or model not found; most base addresses end in /v1",
    405: "the address does not accept such requests; most base addresses end in /v1",
}
"""HTTP statuses that every other request would get too."""
_PASSING = {408, 409, 425, 429}


class JudgeError(RuntimeError):
    """One request failed, including its retries."""


class JudgeDown(RuntimeError):
    """No request can succeed at the moment; answers received so far are kept."""


class Endpoint:
    """A chat endpoint; thread-safe.

    Arguments:
        address: URL to which requests are posted.
        environ: environment variables. The key is `C2R_JUDGE_KEY` or, for OpenAI's own address, `OPENAI_API_KEY`; a
            local endpoint may need none.
        key_in_clear: allow sending the key unencrypted (http) to another machine, where anyone on the way can read it.

    Raises:
        ValueError: the key contains characters that headers forbid, or would be sent unencrypted without permission.
    """

    def __init__(
        self, address: str, patience: Patience, environ: Mapping[str, str], *, key_in_clear: bool = False
    ) -> None:
        self.address, self.patience = address, patience
        self.requests = 0
        """Number of requests sent, including retries."""
        self._key = _key(address, environ)
        here = _is_this_machine(address)
        if self._key and not (here or key_in_clear or urlsplit(address).scheme == "https"):
            raise ValueError(
                f"judge.url: {address} is http, so the API key in the environment would be sent unencrypted to another "
                f"machine; accepted are https, or http on this machine. Unset {KEY} if the endpoint needs no key, or "
                "set judge.key_in_clear to allow this"
            )
        self._stop, self._lock, self._reason = threading.Event(), threading.Lock(), ""
        handlers: list[Any] = [_NoRedirect]
        if here:
            handlers.append(urllib.request.ProxyHandler({}))  # no proxy, which would be another machine
        self._opener = urllib.request.build_opener(*handlers)

    def stop(self, reason: str = "stopped") -> None:
        """Send no further requests; pending ones finish. If called several times, the first `reason` is reported."""
        with self._lock:
            self._reason = self._reason or reason
        self._stop.set()

    def complete(self, body: dict[str, Any]) -> str:
        """The text of the endpoint's answer to a chat completion request with this `body`.

        Raises:
            JudgeError: this request failed.
            JudgeDown: all requests would fail (wrong key or address), or `stop` was called.
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
                raise JudgeError(f"{fault}; the endpoint asks to wait {wait:.0f} s, which is too long")
            if attempt + 1 < self.patience.attempts:
                self._stop.wait(wait)
        raise JudgeError(f"{fault} ({self.patience.attempts} attempts)")

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
        if status in _FATAL:  # without the endpoint's own message, which may contain parts of the key
            return JudgeDown(f"status {status} from {self.address}: {_FATAL[status]}")
        if 300 <= status < 400:
            return JudgeDown(f"status {status} from {self.address}: it redirects to another address; not followed")
        message = self._clean(f"status {status}: {words}")
        return _Passing(message, _seconds(retry_after)) if status in _PASSING or status >= 500 else JudgeError(message)

    def _text(self, raw: bytes) -> str:
        try:
            answer = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            start = raw[:80].decode(errors="replace")
            raise JudgeError(self._clean(f"the answer is not a chat completion: {start!r}")) from None
        if not isinstance(answer, str) or not answer.strip():
            raise JudgeError("the answer contains no text")
        return self._clean(answer)

    def _clean(self, text: str) -> str:
        """`text` without the key, which an endpoint may echo; short keys, such as `EMPTY`, are placeholders."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


class _Passing(Exception):
    """A fault that may be temporary."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Do not follow redirects, which would send the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_this_machine(address: str) -> bool:
    """Whether requests stay on this machine: localhost, or an address of the loopback interface."""
    host = (urlsplit(address).hostname or "").rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _key(address: str, environ: Mapping[str, str]) -> str:
    for name in (KEY, OPENAI_KEY) if address.startswith(OPENAI) else (KEY,):
        key = environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{name}: the key in the environment contains characters that are not allowed in a header")
        if key:
            return key
    return ""


def _read(response: http.client.HTTPResponse, timeout: float) -> bytes:
    """The whole body, within `timeout` seconds in total even if it arrives in small parts."""
    end, parts = time.monotonic() + timeout, []
    while part := response.read1(65536):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError("the answer took too long")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _words_of(error: urllib.error.HTTPError) -> str:
    """The endpoint's error message, on one line."""
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
    """Seconds to wait according to Retry-After, in either of its forms; None if it is absent or invalid."""
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
