"""What the table says in words."""

from typing import Any

import pytest

from c2r.report.table import notes


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        ((0.3, 0.02), (0.1, 0.02), "is lower"),
        ((0.1, 0.02), (0.3, 0.02), "is higher"),
        ((0.2, 0.1), (0.15, 0.1), "is not shown to differ"),
        ((0.2, 0.1), (None, None), None),
    ],
)
def test_absorption_in_words(first: Any, last: Any, said: str | None) -> None:
    rows = [
        {"name": name, "absorption_fraction": value, "absorption_fraction_half_interval": half}
        for name, (value, half) in (("a", first), ("b", last))
    ]
    words = [note for note in notes(rows) if note.startswith("Absorption fraction")]
    assert len(words) == (said is not None)
    assert said is None or said in words[0]


def test_one_sae_is_compared_with_nothing() -> None:
    row = {"name": "a", "absorption_fraction": 0.1, "absorption_fraction_half_interval": 0.1}
    assert not [note for note in notes([row]) if note.startswith("Absorption fraction")]
