"""Rows shuffled within windows of the text: each exactly once, in an order that can be resumed at any position."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from c2r.text.packing import Rows
from c2r.text.shuffle import shuffled_rows


class Numbered:
    """Rows in which every token is the row's number, except the last, which is not real; batches of varying size.

    A pass has `of_a_pass` rows; a batch ends there.
    """

    def __init__(self, rows: int, breaks_at: int | None = None, of_a_pass: int = 10**6) -> None:
        self.rows, self.breaks_at, self.of_a_pass = rows, breaks_at, of_a_pass
        self.read_from: list[int] = []

    def __call__(self, start: Any) -> Iterator[Rows]:
        first = 0 if start is None else start["row"]
        self.read_from.append(first)
        while first < self.rows:
            if self.breaks_at is not None and first >= self.breaks_at:
                raise ConnectionError("the line is dead")
            size = min(3 + first % 3, self.rows - first, self.of_a_pass - first % self.of_a_pass)
            ids = torch.arange(first, first + size)[:, None].expand(size, 5)
            real = torch.arange(5).expand(size, 5) < 4
            yield Rows(ids, real, {"row": first, "parts": [[first // self.of_a_pass, None, True]]})
            first += size


def served(parts: Iterator[Rows]) -> list[int]:
    numbers = []
    for part in parts:
        assert (part.ids == part.ids[:, :1]).all()
        assert part.real.sum() == 4 * len(part.real)
        numbers += part.ids[:, 0].tolist()
    return numbers


@pytest.mark.parametrize(("tokens", "rows"), [(100, 4), (100, 7), (60, 50), (10**6, 4), (1, 2)])
def test_every_row_comes_once_in_its_window(tokens: int, rows: int) -> None:
    found = served(shuffled_rows(Numbered(150), tokens, rows=rows, seed=1)(None))
    assert sorted(found) == list(range(150))
    assert tokens == 1 or found != sorted(found)
    assert max(abs(place - number) for place, number in enumerate(found)) <= (tokens // 5 + 5)
    assert found == served(shuffled_rows(Numbered(150), tokens, rows=rows, seed=1)(None))
    assert found != served(shuffled_rows(Numbered(150), tokens, rows=rows, seed=2)(None))


def test_windows_are_consecutive_and_have_orders_of_their_own() -> None:
    windows: list[list[int]] = []
    for part in shuffled_rows(Numbered(1000), 500, rows=4)(None):
        windows += [[]] * (part.position is not None and part.position["window"] == len(windows))
        windows[-1] = windows[-1] + part.ids[:, 0].tolist()
    assert [number for window in windows for number in sorted(window)] == list(range(1000))
    assert all(100 <= len(window) < 105 for window in windows[:-1])
    orders = [[number - min(window) for number in window][:20] for window in windows]
    assert all(one != other for one, other in itertools.pairwise(orders))


@pytest.mark.parametrize("tokens", [100, 10**6])
def test_every_row_comes_once_before_any_comes_again(tokens: int) -> None:
    found = served(shuffled_rows(Numbered(200, of_a_pass=43), tokens, rows=4)(None))
    for first in range(0, 200, 43):
        assert sorted(found[first : first + 43]) == list(range(first, min(first + 43, 200)))


@pytest.mark.parametrize("rows", [4, 9])
def test_going_on_from_every_position_equals_never_stopping(rows: int) -> None:
    source = Numbered(150)
    whole = list(shuffled_rows(source, 200, rows=rows, seed=3)(None))
    for number, part in enumerate(whole):
        position = json.loads(json.dumps(part.position))
        rest = list(shuffled_rows(source, 200, rows=rows, seed=3)(position))
        assert [r.ids.tolist() for r in rest] == [r.ids.tolist() for r in whole[number:]]
        assert [r.position for r in rest] == [r.position for r in whole[number:]]
    assert source.read_from[-1] > 100  # what is before the window is not read


def test_what_breaks_is_told_when_the_rows_before_its_window_are_served() -> None:
    parts = shuffled_rows(Numbered(1000, breaks_at=250), 500, rows=4)(None)
    found: list[int] = []
    with pytest.raises(ConnectionError, match="the line is dead"):
        found.extend(number for part in parts for number in part.ids[:, 0].tolist())
    assert sorted(found) == list(range(len(found)))
    assert 200 <= len(found) < 250


def test_no_tokens_leave_the_order() -> None:
    assert served(shuffled_rows(Numbered(50), 0, rows=4)(None)) == list(range(50))
