"""Statistics of activations before training, on arrays with known results."""

import io

import pytest
import torch
from rich.console import Console

from c2r.activations.look import SAMPLE, Look, in_words, look_at, say_looks, shares_of_variance
from c2r.activations.reader import Part, measure
from c2r.config.hooks import HookPoint
from c2r.config.run import StreamConfig


def look_of(x: torch.Tensor, keep: torch.Tensor | None = None, ids: torch.Tensor | None = None) -> Look:
    keep = torch.ones(len(x), dtype=torch.bool) if keep is None else keep
    ids = torch.arange(len(x)) if ids is None else ids
    return look_at(x.norm(dim=1), keep, ids, lambda place: x[place], lambda i: f"<{i}>")


def unit_rows_with(lengths: list[float]) -> torch.Tensor:
    """Rows with these norms in 4 dimensions, in random directions."""
    directions = torch.randn(len(lengths), 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(directions, dim=1) * torch.tensor(lengths)[:, None]


def test_shares_of_norms_are_counted() -> None:
    lengths = [2.0] * 90 + [5.0] * 4 + [8.0] * 3 + [14.0] * 2 + [50.0]
    keep = torch.tensor(lengths) <= 20
    ids = torch.tensor([7] * 90 + [1] * 4 + [3] * 3 + [1] * 2 + [9])
    look = look_of(unit_rows_with(lengths), keep, ids)
    assert (look.tokens, look.median_norm, look.largest) == (100, pytest.approx(2), pytest.approx(25))
    assert look.share_over == {"2": 0.10, "5": 0.03, "10": 0.01}
    assert look.share_dropped == 0.01
    # Large and kept are those above 6: three of 8 and two of 14.
    assert look.large_share == pytest.approx(5 / 99)
    large = 3 * 64 + 2 * 196
    assert look.large_square == pytest.approx(large / (90 * 4 + 4 * 25 + large), rel=1e-5)
    assert look.sinks == [{"id": 3, "count": 3, "text": "<3>"}, {"id": 1, "count": 2, "text": "<1>"}]


def test_shares_of_variance_are_those_of_a_diagonal_covariance() -> None:
    # All sign patterns of coordinates scaled by 3, 2, 1: variances 9, 4, 1, whatever the mean.
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1) for b in (-1.0, 1) for c in (-1.0, 1)])
    x = signs * torch.tensor([3.0, 2.0, 1.0]) + torch.tensor([100.0, -7.0, 3.0])
    assert shares_of_variance(x) == (pytest.approx(9 / 14, rel=1e-4), pytest.approx(9 / 14, rel=1e-4))
    # After a rotation by 45°, the first two coordinates share the variance; the first direction's share is unchanged.
    turn = torch.tensor([[0.5**0.5, -(0.5**0.5), 0], [0.5**0.5, 0.5**0.5, 0], [0, 0, 1.0]])
    assert shares_of_variance(x @ turn.T) == (pytest.approx(9 / 14, rel=1e-4), pytest.approx(6.5 / 14, rel=1e-4))
    assert shares_of_variance(torch.ones(5, 3)) == (0, 0)


def test_the_first_direction_in_many_dimensions_is_the_one_of_an_exact_decomposition() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 60, generator=generator)
    along, strength = torch.randn(60, generator=generator), torch.randn(400, 1, generator=generator)
    x += strength * 4 * along / along.norm()
    before = torch.get_rng_state()
    values = torch.linalg.svdvals(x - x.mean(0)).double().square()
    assert shares_of_variance(x)[0] == pytest.approx((values[0] / values.sum()).item(), rel=1e-3)
    assert torch.equal(torch.get_rng_state(), before)  # training's random numbers are left alone


def test_large_tokens_own_the_first_direction_until_they_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 30, generator=generator)
    x[::300] = 40 * torch.eye(30)[3]  # ten tokens, all along one coordinate
    look = look_of(x)
    assert look.large_share == pytest.approx(10 / 3000)
    assert look.large_square == pytest.approx(16_000 / (16_000 + 2990 * 30), rel=0.03)
    assert look.first_direction == pytest.approx(look.top_coordinate, rel=0.01)
    assert look.first_direction > 3 * look.first_direction_without
    assert look.first_direction_without < 2 / 30


def test_variances_are_taken_from_a_sample_of_the_whole() -> None:
    asked = []

    def rows_of(place: torch.Tensor) -> torch.Tensor:
        asked.append(place)
        return torch.randn(len(place), 2, generator=torch.Generator().manual_seed(0))

    n = 3 * SAMPLE + 5
    keep = torch.ones(n, dtype=torch.bool)
    keep[0] = False
    look_at(torch.ones(n), keep, torch.zeros(n, dtype=torch.int32), rows_of)
    assert len(asked[0]) <= SAMPLE
    assert asked[0][0] == 1
    assert asked[0][-1] > n - 8


@pytest.mark.parametrize(
    ("multiple", "large_share", "large_square", "advised"),
    [
        (10.0, 0.008, 0.33, True),
        (None, 0.008, 0.33, True),
        (10.0, 0.008, 0.04, False),  # they hold little
        (10.0, 0.08, 0.5, False),  # they are too many to be outliers
        (3.0, 0.008, 0.33, False),  # the multiple is already at the advised value
    ],
)
def test_what_to_set_is_said_where_it_matters(
    multiple: float | None, large_share: float, large_square: float, advised: bool
) -> None:
    look = Look(
        1000, 92.0, 400.0, {"2": 0.014, "5": 0.008, "10": 0.0003}, 0.0, large_share, large_square, 0.44, 0.08, 0.41,
        [{"id": 5, "count": 4, "text": " the"}, {"id": 6, "count": 2, "text": None}],
    )  # fmt: skip
    lines, advice = in_words("blocks.5.hook_resid_post", look._asdict(), multiple)
    said = " ".join([*lines, advice or ""])
    assert f"{large_share:.2%} of the tokens" in said
    assert f"{large_square:.0%} of the squared norm" in said
    assert "' the', token 6" in said
    assert (advice is not None) == advised
    assert advice is None or "stream.max_norm_multiple" in advice
    assert advice is None or "set it to 3" in advice


def test_what_is_measured_over_parts_is_what_is_measured_over_all() -> None:
    point = HookPoint(0, "resid_post")
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x[17] *= 90

    def parts(*sizes: int) -> list[Part]:
        return [
            Part({point: piece}, {point: piece.norm(dim=1)}, ids.int(), torch.zeros(len(ids), 2).int(), None)
            for piece, ids in zip(x.split(list(sizes)), torch.arange(50).split(list(sizes)), strict=True)
        ]

    config = StreamConfig(max_norm_multiple=20)
    whole = measure(parts(50), 40, config, str)
    assert measure(parts(7, 20, 23), 40, config, str) == whole
    assert whole.look[point]["tokens"] == 40
    assert whole.look[point]["share_dropped"] == 1 / 40
    assert measure(parts(50), 40, StreamConfig(max_norm_multiple=None), str).look[point]["sinks"] == [
        {"id": 17, "count": 1, "text": "17"}
    ]


def test_brackets_in_a_token_are_printed_as_they_are() -> None:
    look = look_of(unit_rows_with([1.0] * 200 + [9.0]), ids=torch.full((201,), 4))._asdict()
    look["sinks"][0]["text"] = "[/red]"
    out = io.StringIO()
    say_looks({"here": look}, 10.0, Console(file=out, width=400))
    assert "'[/red]'" in out.getvalue()
