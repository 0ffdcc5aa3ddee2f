"""A local server that speaks the chat completions API, and judges that answer through it."""

import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the stub sends back, and how."""

    body: bytes
    status: int = 200
    headers: dict[str, str] | None = None
    delay: float = 0.0
    """Seconds before it answers."""
    drip: float = 0.0
    """Seconds between the bytes of the body."""
    cut: int | None = None
    """Hang up after so many bytes of the body; -1: before the status line."""


def said(text: Any, **how: Any) -> Reply:
    """A chat completion that says `text`."""
    return Reply(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), **how)


def fault(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI words it; retry_after="1" becomes Retry-After."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return Reply(json.dumps({"error": {"message": message}}).encode(), status, named)


class StubJudge:
    """Serves while entered; `answer(number, body)` decides on the reply to each request, numbered from 0."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "StubJudge":
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub._serve(self)

            def log_message(self, *_: Any) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body | {"path": handler.path})
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        reply = self.answer(number, body)
        time.sleep(reply.delay)
        with self._lock:
            self.under_way -= 1
        with contextlib.suppress(OSError):  # the client may have given up
            self._send(handler, reply)

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        handler.close_connection = True
        if reply.cut == -1:
            return
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **(reply.headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        for start in range(0, len(reply.body), 1 if reply.drip else len(reply.body)):
            handler.wfile.write(reply.body[start : reply.cut] if not reply.drip else reply.body[start : start + 1])
            time.sleep(reply.drip)


def question_of(body: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The explanation that a request carries (None where it asks for one), and its windows."""
    task = body["messages"][1]["content"]
    head, _, listed = task.rpartition("\n\n") if task.startswith("The feature fires on: ") else ("", "", task)
    windows = [re.sub(r"^\d+\. ", "", line) for line in listed.split("\n")]
    return (head.removeprefix("The feature fires on: ") or None), windows


def oracle(_: int, body: dict[str, Any]) -> Reply:
    """Names the marked words, and finds them again: right about every latent that fires on a word."""
    explanation, windows = question_of(body)
    if explanation is None:
        marked = {word for window in windows for run in re.findall("⟦(.*?)⟧", window) for word in run.split()}
        return said(" ".join(sorted(marked)))
    words = set(explanation.split())
    found = [str(number) for number, window in enumerate(windows, 1) if words.intersection(window.split())]
    return said(", ".join(found) or "None")


def coin(_: int, body: dict[str, Any]) -> Reply:
    """Explains nothing and tosses a coin for each window, the same for the same question."""
    explanation, windows = question_of(body)
    if explanation is None:
        return said("something or other")
    chance = random.Random(hashlib.sha256(json.dumps(body).encode()).hexdigest())
    return said(", ".join(str(n) for n in range(1, len(windows) + 1) if chance.random() < 0.5) or "None")
