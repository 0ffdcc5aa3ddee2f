"""Requests against a local stub that answers well, badly, slowly, or not at all."""

import email.utils
import socket
import threading
import time
from typing import Any

import pytest

from c2r.config.evaluations import Patience
from c2r.eval.autointerp.endpoint import Endpoint, JudgeDown, JudgeError, _seconds
from stub_judge import Reply, StubJudge, fault, said

SECRET = "sk-secret-0123456789"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
QUICK = Patience(timeout=5.0, attempts=4, first_wait=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def ask(stub: StubJudge, patience: Patience = QUICK, **environ: str) -> str:
    return Endpoint(f"{stub.url}/chat/completions", patience, {"C2R_JUDGE_KEY": SECRET} | environ).complete(BODY)


def in_turn(*replies: Reply) -> Any:
    """The replies one after another, the last one for good."""
    return lambda number, _: replies[min(number, len(replies) - 1)]


def test_a_good_answer_and_what_is_sent() -> None:
    with StubJudge(in_turn(said("good"))) as stub:
        assert ask(stub) == "good"
    assert stub.bodies == [{**BODY, "path": "/v1/chat/completions"}]
    assert stub.headers[0]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    "bad",
    [
        fault(429),
        fault(429, retry_after="0"),
        fault(429, retry_after="soon"),
        fault(429, retry_after=email.utils.formatdate(time.time() - 5, usegmt=True)),
        fault(500),
        fault(503),
        Reply(b"<html>", 502),
        said("never read", cut=-1),
        said("cut short", cut=20),
    ],
)
def test_what_passes_is_tried_again(bad: Reply) -> None:
    with StubJudge(in_turn(bad, bad, said("good"))) as stub:
        assert ask(stub) == "good"
    assert len(stub.bodies) == 3


def test_retry_after_is_kept_to() -> None:
    with StubJudge(in_turn(fault(429, retry_after="0.4"), said("good"))) as stub:
        assert ask(stub) == "good"
    assert 0.4 <= stub.times[1] - stub.times[0] < 5.0
    asked = _seconds(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert asked is not None
    assert 90 < asked <= 100
    with StubJudge(in_turn(fault(429, retry_after="3600"))) as stub, pytest.raises(JudgeError, match="to wait 3600 s"):
        ask(stub)
    assert len(stub.bodies) == 1


def test_waits_double() -> None:
    with StubJudge(in_turn(fault(500))) as stub, pytest.raises(JudgeError, match=r"status 500: no \(4 attempts\)"):
        ask(stub, QUICK.model_copy(update={"first_wait": 0.08}))
    gaps = [b - a for a, b in zip(stub.times, stub.times[1:], strict=False)]
    assert len(gaps) == 3
    for gap, planned in zip(gaps, (0.08, 0.16, 0.32), strict=True):
        assert 0.75 * planned <= gap < 1.25 * planned + 2.0


@pytest.mark.parametrize("slow", [{"delay": 0.6}, {"drip": 0.05}])
def test_slow_answers_are_given_up_and_tried_again(slow: dict[str, float]) -> None:
    with StubJudge(in_turn(said("late", **slow), said("good"))) as stub:
        assert ask(stub, QUICK.model_copy(update={"timeout": 0.3})) == "good"
    with (
        StubJudge(in_turn(said("late", **slow))) as stub,
        pytest.raises(JudgeError, match=r"connection lost.*2 attempts"),
    ):
        ask(stub, QUICK.model_copy(update={"timeout": 0.3, "attempts": 2}))


@pytest.mark.parametrize(
    "bad",
    [
        Reply(b"I am a web page"),
        Reply(b""),
        Reply(b"[]"),
        Reply(b'{"choices": []}'),
        Reply(b'{"choices": [{"text": "old"}]}'),
        said(None),
        said("  "),
        said(["parts"]),
    ],
)
def test_no_chat_completion_is_an_error_at_once(bad: Reply) -> None:
    with StubJudge(in_turn(bad)) as stub, pytest.raises(JudgeError, match=r"not a chat completion|contains no text"):
        ask(stub)
    assert len(stub.bodies) == 1


def test_a_fault_of_one_request() -> None:
    with StubJudge(in_turn(fault(400, "too long\nfor me"))) as stub, pytest.raises(JudgeError, match="too long for me"):
        ask(stub)
    assert len(stub.bodies) == 1


@pytest.mark.parametrize(("status", "says"), [(401, "C2R_JUDGE_KEY"), (403, "refused"), (404, "/v1"), (405, "/v1")])
def test_what_every_request_would_meet(status: int, says: str) -> None:
    wrong = fault(status, f"your key {SECRET[:8]}… is wrong")
    with StubJudge(in_turn(wrong)) as stub, pytest.raises(JudgeDown, match=says) as error:
        ask(stub)
    assert len(stub.bodies) == 1
    assert SECRET[:8] not in str(error.value)


def test_redirects_are_not_followed() -> None:
    with StubJudge(in_turn(said("stolen"))) as other:
        moved = Reply(b"", 307, {"Location": f"{other.url}/chat/completions"})
        with StubJudge(in_turn(moved)) as stub, pytest.raises(JudgeDown, match="redirects to another address"):
            ask(stub)
    assert other.bodies == []


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", QUICK, {})
        with pytest.raises(JudgeError, match=r"no connection: .*4 attempts"):
            endpoint.complete(BODY)


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_key_that_the_endpoint_repeats_is_left_out(status: int) -> None:
    reply = said(f"was it {SECRET}?") if status == 200 else fault(status, f"was it {SECRET}?")
    with StubJudge(in_turn(reply)) as stub:
        try:
            heard = ask(stub)
        except JudgeError as error:
            heard = str(error)
    assert "was it [key]?" in heard
    with StubJudge(in_turn(said("EMPTY as it is"))) as stub:
        assert ask(stub, C2R_JUDGE_KEY="EMPTY") == "EMPTY as it is"


def test_openais_key_is_for_openai_alone() -> None:
    with StubJudge(in_turn(said("good"))) as stub:
        ask(stub, C2R_JUDGE_KEY="", OPENAI_API_KEY=SECRET)
    assert "Authorization" not in stub.headers[0]
    openai = Endpoint("https://api.openai.com/v1/chat/completions", QUICK, {"OPENAI_API_KEY": SECRET})
    assert openai._key == SECRET
    assert Endpoint("https://api.openai.com.evil.org/v1", QUICK, {"OPENAI_API_KEY": SECRET})._key == ""


def test_a_key_that_is_none_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="C2R_JUDGE_KEY: the key in the environment contains characters") as error:
        Endpoint("http://localhost/v1", QUICK, {"C2R_JUDGE_KEY": f"{SECRET}\nX: y"})
    assert SECRET not in str(error.value)


def test_stop_ends_a_wait() -> None:
    with StubJudge(in_turn(fault(429, retry_after="60"))) as stub:
        endpoint = Endpoint(f"{stub.url}/chat/completions", QUICK, {})
        threading.Timer(0.2, endpoint.stop).start()
        start = time.monotonic()
        with pytest.raises(JudgeDown, match="stopped"):
            endpoint.complete(BODY)
    assert time.monotonic() - start < 5
    assert len(stub.bodies) == 1


@pytest.mark.parametrize(
    ("address", "safe"),
    [
        ("https://api.example.org/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://box.localhost/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://api.example.org/v1", False),
        ("http://192.168.0.7:8000/v1", False),
        ("http://gpu-box:8000/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://0.0.0.0:8000/v1", False),
    ],
)
def test_a_key_is_not_sent_in_clear_beyond_this_machine(address: str, safe: bool) -> None:
    keyed = {"C2R_JUDGE_KEY": SECRET}
    if safe:
        assert Endpoint(address, QUICK, keyed)._key == SECRET
    else:
        with pytest.raises(ValueError, match="unencrypted") as refused:
            Endpoint(address, QUICK, keyed)
        assert SECRET not in str(refused.value)
        assert Endpoint(address, QUICK, keyed, key_in_clear=True)._key == SECRET
    assert Endpoint(address, QUICK, {})._key == ""  # without a key there is nothing to give away


def test_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    with StubJudge(in_turn(said("from the proxy"))) as proxy, StubJudge(in_turn(said("from here"))) as stub:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert ask(stub) == "from here"
        assert proxy.bodies == []
