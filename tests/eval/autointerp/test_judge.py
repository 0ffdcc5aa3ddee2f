"""What a judge remembers, and the settings it refuses."""

import re
from pathlib import Path

import pytest

from c2r.cli import main
from c2r.config.evaluations import JudgeConfig, Patience
from c2r.config.faults import checked_section
from c2r.eval.autointerp.endpoint import JudgeDown, JudgeError
from c2r.eval.autointerp.judge import FAILURES_IN_A_ROW, Judge
from stub_judge import StubJudge, fault, said

SECRET = "sk-secret-0123456789"
QUICK = Patience(timeout=5.0, attempts=2, first_wait=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def judge_at(url: str, folder: Path, model: str = "m", **options: object) -> Judge:
    return Judge(JudgeConfig(url=url, model=model, options=options, patience=QUICK), folder, {"C2R_JUDGE_KEY": SECRET})


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
        with pytest.raises(
            JudgeDown, match=f"{FAILURES_IN_A_ROW} requests in a row failed, the last one with: status 400"
        ):
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
    with pytest.raises(ValueError, match=r"url\n.*accepted are") as error:
        JudgeConfig(url=url, model="m")
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": None}, "--judge-url: Field required"),
        ({"url": "ftp://host"}, "--judge-url: accepted are http"),
        ({"model": None}, "--judge-model: Field required"),
        ({"options": "{"}, "--judge-options: got '{'; expected a JSON object"),
        ({"options": "3"}, "--judge-options: got '3'; expected a JSON object"),
        ({"options": '["temperature"]'}, "expected a JSON object"),
        ({"options": '{"stream": true, "messages": []}'}, "--judge-options: got messages, stream; accepted are other"),
        ({"latents": "0"}, r"--judge-latents: .* \(got 0\)"),
    ],
)
def test_settings_that_are_refused(
    settings: dict[str, str | None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"url": "http://localhost:8000/v1", "model": "m", **settings}
    options = [word for name, value in given.items() if value is not None for word in (f"--judge-{name}", value)]
    with pytest.raises(SystemExit):
        main(["eval", "nowhere", "--suite", "autointerp", *options])
    assert re.search(says, capsys.readouterr().err)


def test_settings_of_the_command_line_reach_the_judge() -> None:
    given = {"url": "http://localhost:8000/v1", "model": "m", "latents": 5, "max_requests": 9}
    config = checked_section(JudgeConfig, {**given, "options": {"temperature": 0}})
    assert (config.latents, config.max_requests, config.options) == (5, 9, {"temperature": 0})
    with pytest.raises(ValueError, match=r"max_requests: .* \(got 0\)"):
        checked_section(JudgeConfig, {**given, "max_requests": 0})
