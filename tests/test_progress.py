"""Progress without a terminal: one line early, few in between, one at the end."""

import io

import pytest
from rich.console import Console

from c2r import progress
from c2r.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def file_console() -> Console:
    return Console(file=io.StringIO(), width=40)


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_lines_tell_what_is_done_the_rate_and_the_time_left(clock: list[float]) -> None:
    console = file_console()
    with progress_bar(console) as bar:
        task = bar.add_task("core evaluation of many SAEs on [b]text[/]", total=40_000, unit="tokens")
        for _ in range(20):
            clock[0] += 8
            bar.advance(task, 2000)
    assert lines_of(console) == [  # not wrapped, and at most one every 20 seconds
        "core evaluation of many SAEs on text: 2,000/40,000 tokens, 250/s, 2.5 min left",
        "core evaluation of many SAEs on text: 8,000/40,000 tokens, 250/s, 2.1 min left",
        "core evaluation of many SAEs on text: 14,000/40,000 tokens, 250/s, 1.7 min left",
        "core evaluation of many SAEs on text: 20,000/40,000 tokens, 250/s, 1.3 min left",
        "core evaluation of many SAEs on text: 26,000/40,000 tokens, 250/s, 56 s left",
        "core evaluation of many SAEs on text: 32,000/40,000 tokens, 250/s, 32 s left",
        "core evaluation of many SAEs on text: 38,000/40,000 tokens, 250/s, 8 s left",
        "core evaluation of many SAEs on text: 40,000/40,000 tokens, 250/s, 2.7 min in total",
    ]


def test_more_than_was_announced_is_said_once(clock: list[float]) -> None:
    """Text is read in whole batches, so slightly more than the total may be processed."""
    console = file_console()
    with progress_bar(console) as bar:
        task = bar.add_task("core", total=100)
        for _ in range(6):
            clock[0] += 15
            bar.advance(task, 30)
    assert lines_of(console) == [
        "core: 30/100, 2/s, 35 s left",
        "core: 90/100, 2/s, 5 s left",
        "core: 120/100, 2/s, 1.0 min in total",
    ]


def test_what_is_tracked_says_so_too(clock: list[float]) -> None:
    console = file_console()
    with progress_bar(console) as bar:
        for _ in bar.track(range(4), description="words"):
            clock[0] += 0.5
    assert lines_of(console) == ["words: 1/4, 2/s, 2 s left"]  # too short for another


def test_nothing_done_says_nothing_and_one_step_is_said_at_its_end(clock: list[float]) -> None:
    console = file_console()
    with progress_bar(console) as bar:
        bar.advance(bar.add_task("nothing", total=3), 0)
        task = bar.add_task("one step")
        clock[0] += 65
        bar.update(task, total=1, completed=1)
        list(bar.track([], description="empty"))
    assert lines_of(console) == ["one step: 1/1, 0.015/s, 1.1 min in total"]


def test_a_terminal_has_a_bar() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, legacy_windows=False)
    with progress_bar(console) as bar:
        for _ in bar.track(range(4), description="words"):
            pass
    assert "100%" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "words: " not in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
