"""What a judge remembers, and the settings it refuses."""

from pathlib import Path

import pytest

from c2r.eval.autointerp.endpoint import JudgeDown, JudgeError, Patience
from c2r.eval.autointerp.judge import FAILURES_IN_A_ROW, Judge, JudgeConfig, judge_of
from stub_judge import StubJudge, fault, said

SECRET = "sk-secret-0123456789"
QUICK = Patience(timeout=5.0, attempts=2, first_wait=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def judge_at(url: str, folder: Path, model: str = "m", **options: object) -> Judge:
    return Judge(JudgeConfig(url, model, options=options, patience=QUICK), folder, {"C2R_JUDGE_KEY": SECRET})


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    with StubJudge(lambda number, _: said(f"answer {number}")) as stub:
        judge = judge_at(stub.url, tmp_path)
        assert judge.known(asked("a")) is None
        assert [judge.ask(asked(text)) for text in "aba"] == ["answer 0", "answer 1", "answer 0"]
        assert judge_at(stub.url, tmp_path).ask(asked("a")) == "answer 0"
        assert judge_at(f"{stub.url}/chat/completions/", tmp_path).ask(asked("a")) == "answer 0"
        assert len(stub.bodies) == 2
        assert judge_at(stub.url, tmp_path, "another").ask(asked("a")) == "answer 2"
        assert judge_at(stub.url, tmp_path, temperature=0).ask(asked("a")) == "answer 3"
        assert stub.bodies[3]["temperature"] == 0
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-9])
        assert judge.ask(asked("a")) == "answer 4"
    assert len(list(tmp_path.iterdir())) == 4
    assert all(SECRET not in path.read_text() for path in tmp_path.iterdir())


def test_failures_are_not_kept(tmp_path: Path) -> None:
    with StubJudge(lambda number, _: fault(400) if number == 0 else said("good")) as stub:
        judge = judge_at(stub.url, tmp_path)
        with pytest.raises(JudgeError):
            judge.ask(asked("a"))
        assert list(tmp_path.iterdir()) == []
        assert judge.ask(asked("a")) == "good"


def test_an_endpoint_that_only_fails_is_given_up(tmp_path: Path) -> None:
    def every_other_row(number: int, _: object) -> object:
        return said("good") if number == FAILURES_IN_A_ROW - 1 else fault(400)

    with StubJudge(every_other_row) as stub:
        judge = judge_at(stub.url, tmp_path)
        for number in range(2 * FAILURES_IN_A_ROW):
            if number == FAILURES_IN_A_ROW - 1:
                assert judge.ask(asked(str(number))) == "good"  # and the count begins anew
                continue
            with pytest.raises(JudgeError):
                judge.ask(asked(str(number)))
        with pytest.raises(JudgeDown, match=f"{FAILURES_IN_A_ROW} requests in a row failed, the last with: status 400"):
            judge.ask(asked("last"))
        assert judge.ask(asked(str(FAILURES_IN_A_ROW - 1))) == "good"  # what is kept is still there
        assert len(stub.bodies) == 2 * FAILURES_IN_A_ROW


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "https:///v1",
        "https://user:sk-secret@host/v1",
        "https://host/v1?api-key=sk-secret",
        "https://host/v1#sk-secret",
        "http://[sk-secret/v1",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--judge-url: accepted are") as error:
        JudgeConfig(url, "m")
    assert "sk-secret" not in str(error.value)


def test_settings_that_are_refused() -> None:
    url = "http://localhost:8000/v1"
    assert judge_of(None, None, 100, None, None) is None
    assert judge_of(url, "m", 5, '{"temperature": 0}', 9) == JudgeConfig(url, "m", 5, 9, {"temperature": 0})
    with pytest.raises(ValueError, match="--judge-model: nothing given"):
        judge_of(url, None, 100, None, None)
    with pytest.raises(ValueError, match="--judge-url"):
        judge_of(None, "m", 100, None, None)
    for options in ("{", "3", '["temperature"]'):
        with pytest.raises(ValueError, match=r"--judge-options: got .* accepted is a JSON object"):
            judge_of(url, "m", 100, options, None)
    with pytest.raises(ValueError, match="--judge-options: got messages, stream; accepted are other"):
        JudgeConfig(url, "m", options={"stream": True, "messages": []})
    with pytest.raises(ValueError, match="--judge-latents: got 0"):
        JudgeConfig(url, "m", 0)
    with pytest.raises(ValueError, match="--max-requests: got 0"):
        JudgeConfig(url, "m", max_requests=0)
