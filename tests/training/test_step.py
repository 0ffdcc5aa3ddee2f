"""Properties of a step that final metrics do not show: fp32 gradients, NaN and zero rows, how fresh the neighbour table
is, what is saved, what int8 selects."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import known_run
from c2r import losses as terms
from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS, BatchTopKConfig, ConsistencyConfig
from c2r.kernels import above
from c2r.kernels.codes import Codes, decode_groups, encode_all, from_dense
from c2r.kernels.int8 import Coarse
from c2r.neighbors import NeighborTable, nearest_neighbors, random_floor, renewed_rows
from c2r.sae.model import SAE
from c2r.sae.selection import BatchTopK
from c2r.training.optim import normalise_rows, project_gradient, random_unit_rows
from c2r.training.run import Run
from c2r.training.trainer import train


def run_of(
    width: int = 64, d_in: int = 16, steps: int = 100, c2r: dict[str, Any] | None = None, **changes: Any
) -> Run[Any]:
    config = BatchTopKConfig.model_validate(
        {"name": "x", "width": width, "k": 4, "k_anneal": 0, "c2r": c2r, "clip": None, **changes}
    )
    settings = TrainConfig(tokens=steps * 128, batch=128, precision="float32", lr=1e-3, warmup_steps=0)
    return Run(config, settings, d_in)


def rows(seed: int = 0, d_in: int = 16) -> Tensor:
    return torch.randn(128, d_in, generator=torch.Generator().manual_seed(seed)) / d_in**0.5


# Precision of the dense path


@pytest.mark.parametrize("subtracted", [False, True])
def test_the_dense_products_gradients_are_fp32s(subtracted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(96, 24, generator=generator), torch.randn(40, 24, generator=generator, requires_grad=True)
    b_enc, b_dec = (torch.randn(size, generator=generator, requires_grad=True) for size in (40, 24))
    upstream = torch.randn(96, 40, generator=generator)
    pre = encode_all(x, W, b_enc, b_dec if subtracted else None, torch.bfloat16)
    centred = (x - b_dec if subtracted else x).detach()
    exact = centred.double() @ W.detach().double().T + b_enc.detach()
    assert 1e-4 < ((pre - exact).norm() / exact.norm()).item() < 1e-2  # the product is bf16's
    pre.backward(upstream)
    total_F = upstream.double().sum(0)
    expected = {
        "W": (W.grad, upstream.double().T @ centred.double()),
        "b_enc": (b_enc.grad, total_F),
        "b_dec": (b_dec.grad, -total_F @ W.detach().double() if subtracted else None),
    }
    for name, (found, wanted) in expected.items():
        if wanted is None:
            assert found is None
        else:
            assert found is not None
            assert ((found - wanted).norm() / wanted.norm()).item() < 1e-6, name


@pytest.mark.parametrize("method", ["standard", "april_update", "p_anneal", "gated", "jump_relu"])
def test_a_dense_step_in_bfloat16_has_gradients_off_bfloat16s_grid(method: str) -> None:
    more = {"target_l0": 4} if method == "jump_relu" else {}
    run = Run(
        SECTIONS[method](name="x", width=96, **more), TrainConfig(tokens=51200, batch=128, precision="bfloat16"), 16
    )
    run.optimizer.step = run.optimizer.zero_grad = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    assert not run.activity.sparse_pays
    run.step(rows())
    grad = run.sae.W_enc.grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert (grad == grad.bfloat16().float()).float().mean() < 0.2


# Rows with NaN, and zero rows


@pytest.mark.parametrize("mode", ["exact", "chunked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_row_that_is_not_finite_is_named(mode: Any, value: float) -> None:
    decoder = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    decoder[7, 2] = decoder[11, 0] = value
    with pytest.raises(ValueError, match=r"decoder: row 7 has no finite norm, .* \(2 of 40 rows"):
        nearest_neighbors(decoder, mode=mode)
    decoder[7, 2] = decoder[11, 0] = 0
    decoder[20] = 0
    assert nearest_neighbors(decoder, mode=mode).cosine[20] == 0


@pytest.mark.parametrize("neighbors", ["exact", "chunked", "lagged"])
def test_training_names_the_sae_and_the_row(neighbors: str) -> None:
    run = run_of(c2r={"strength": 1.0, "neighbors": neighbors})
    if neighbors != "lagged":  # which searches the whole decoder once, when it begins
        run.step(rows())
    run.sae.W_dec.data[5, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"saes\.x: at step {run.step_number}, decoder: row 5 .*1 of 64 rows"):
        run.step(rows(1))


def test_a_row_of_zeros_leaves_the_weights_finite() -> None:
    W = random_unit_rows(32, 16, 0)
    W_dec = W.clone()
    W_dec[3] = 0
    W_dec[4] = 1e-30 * W[4]  # whose square is 0 in fp32
    start = SAE(W.clone(), torch.zeros(32), W_dec.clone(), torch.zeros(16), architecture="standard")
    config = BatchTopKConfig(name="x", width=32, k=8, k_anneal=0, c2r=ConsistencyConfig(strength=1.0))
    run = Run(config, TrainConfig(tokens=5120, batch=128, precision="float32", warmup_steps=0), 16, start=start)
    for step in range(3):
        assert math.isfinite(run.step(rows(step))["loss"].item())
    assert all(weight.isfinite().all() for weight in run.sae.parameters())
    # The projection still removes the component along the other rows, and leaves a zero row's gradient unchanged.
    weight = torch.nn.Parameter(W_dec.clone())
    weight.grad = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    given = weight.grad.clone()
    project_gradient(weight)
    along = (weight.grad * W).sum(1)
    assert along[[i for i in range(32) if i not in (3, 4)]].abs().max() < 1e-6
    assert torch.equal(weight.grad[3], given[3])
    normalise_rows(weight)
    assert weight.isfinite().all()


# Margin


def test_a_floor_that_no_cosine_exceeds_is_refused(tmp_path: Any) -> None:
    says = r"saes\.x\.c2r\.margin: got 'floor', which is √\(2 ln F / D\) = 1\.25 at F = 512 latents and D = 8"
    with pytest.raises(ValueError, match=says):
        run_of(width=512, d_in=8, c2r={"strength": 1.0, "margin": "floor"})
    saes = [{"name": "x", "width": 170_000, "k": 2, "c2r": {"strength": 1.0, "margin": "floor"}}]
    with pytest.raises(ValueError, match=r"= 1\.00 at F = 170000 latents and D = 24"):
        train(known_run(tmp_path / "run", saes=saes))
    assert not (tmp_path / "run" / "run.yaml").exists()
    consistency = run_of(width=512, d_in=16, c2r={"strength": 1.0, "margin": "floor"}).consistency
    assert consistency is not None
    assert consistency.margin < 1
    assert [random_floor(*shape) for shape in ((2, 1), (1, 1), (1, 8), (4096, 1))] == [1, 0, 0, 1]


# How fresh the neighbour table is


def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows of each renewal that follows."""
    found: list[tuple[int, int]] = []
    from c2r import neighbors

    original = neighbors.nearest_of_slice

    def noted(rows_FD: Tensor, inverse_F: Tensor, start: int, stop: int, *more: Any) -> Any:
        found.append((start, stop))
        return original(rows_FD, inverse_F, start, stop, *more)

    monkeypatch.setattr(neighbors, "nearest_of_slice", noted)
    return found


def test_every_row_is_renewed_as_often_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [renewed_rows(width, 10**6) for width in (20, 4096, 16384, 65536, 10**6)] == [20, 32, 32, 128, 1024]
    assert renewed_rows(4096, 733) == math.ceil(20 * 4096 / 733)
    found, run = searched(monkeypatch), run_of(width=700, steps=10**4, c2r={"strength": 0.1})
    for step in range(1 + math.ceil(700 / 32)):  # the first searches the whole
        run.step(rows(step))
    assert {row for start, stop in found for row in range(start, stop)} == set(range(700))
    assert max(stop - start for start, stop in found) == 32


@pytest.mark.parametrize(("every", "start"), [(1, 0), (5, 0), (5, 3)])
def test_the_table_is_renewed_in_every_step_from_the_first_that_needs_it(
    every: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searched(monkeypatch)
    run = run_of(width=96, c2r={"strength": 0.1, "every": every, "start": start})
    terms_of_steps = [run.step(rows(step))["c2r"].item() for step in range(12)]
    assert len(found) == 12 - start - 1
    assert [term > 0 for term in terms_of_steps] == [s >= start and (s - start) % every == 0 for s in range(12)]


def test_exact_neighbours_are_searched_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run, searches = run_of(c2r={"strength": 0.1, "every": 5, "neighbors": "exact"}), []
    original = run.table.refresh
    monkeypatch.setattr(run.table, "refresh", lambda W: searches.append(run.step_number) or original(W))
    for step in range(12):
        run.step(rows(step))
    assert searches == [0, 5, 10]


def test_a_late_start_leaves_as_many_renewals() -> None:
    late = run_of(width=4096, steps=1000, c2r={"strength": 0.1, "start": 900})
    assert late.table.rows == renewed_rows(4096, 100) > renewed_rows(4096, 1000)


def test_a_neighbour_that_loses_to_its_shortlist_takes_the_winners_place_there() -> None:
    """Row 0 turns to row 2 and back between its own renewals: only the displaced shortlist entry brings row 1 back."""
    near, turned = torch.eye(8), torch.eye(8)
    near[0] += 0.5 * near[1] + 0.4 * near[2]
    turned[0] += 0.4 * turned[1] + 0.5 * turned[2]
    table = NeighborTable(rows=8, shortlist=3)
    assert table.refresh(near).index[0] == 1
    table.shortlist_MF = torch.tensor([[2], [3], [4]]).expand(3, 8).clone()  # as long after a renewal: without row 1
    table.rows, table.cursor = 1, 1
    seen = [table.refresh(decoder).index[0].item() for decoder in (near, turned, turned, turned, near, near, near)]
    assert seen == [1, 1, 1, 2, 2, 2, 1]  # the first, fourth and seventh look at the place where row 2 was
    assert table.cursor == 0


# Groups


@pytest.mark.parametrize("sparse", [False, True])
def test_groups_have_the_gradient_of_prefixes_without_a_whole_one_each(sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(20, 30, generator=generator) * (torch.rand(20, 30, generator=generator) < 0.3)
    W, b = torch.randn(30, 7, generator=generator, requires_grad=True), torch.randn(7, generator=generator)
    ends, weights = (4, 11, 30), (0.2, 0.5, 0.3)
    x = torch.randn(20, 7, generator=generator)
    found = decode_groups(from_dense(dense) if sparse else dense, W, b, ends)
    loss = sum(w * (x - part).square().sum() for w, part in zip(weights, found, strict=True))
    wanted = sum(w * (x - dense[:, :e] @ W[:e] - b).square().sum() for w, e in zip(weights, ends, strict=True))
    assert isinstance(loss, Tensor)
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, W, retain_graph=True), torch.autograd.grad(wanted, W))
    nodes, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            queue += [before for before, _ in node.next_functions]
    into_W = [node.name() for node in nodes if any("Accumulate" in str(b) for b, _ in node.next_functions)]
    assert into_W == ["SplitWithSizesBackward0"]


# What is saved, and defaults


def test_the_saved_threshold_is_the_average() -> None:
    run = run_of(steps=60, threshold_start=9, threshold_decay=0.9)
    average = None
    for step in range(40):
        run.step(rows(step))
        smallest = run.memory.smallest.item()
        if step == 5:
            assert torch.equal(run.export(3.0).threshold, torch.full((64,), 3 * smallest))  # not yet tracked
        if step > 9:
            average = smallest if average is None else 0.9 * average + 0.1 * smallest
    assert average is not None
    saved = run.export(3.0).threshold
    assert saved is not None
    assert abs(smallest - average) > 1e-3  # pyright: ignore[reportPossiblyUnboundVariable]
    torch.testing.assert_close(saved.data, torch.full((64,), 3 * average), rtol=1e-5, atol=0)


def test_aux_k_uses_half_as_many_dead_latents_as_activations_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = terms.aux_k

    def noted(forward: Any, k: int, **more: Any) -> Tensor:
        seen.append(k)
        return original(forward, k, **more)

    monkeypatch.setattr(terms, "aux_k", noted)
    losses = []
    for aux_k in (None, 8, 16):
        run = run_of(aux_k=aux_k, dead_after_tokens=1000)
        run.sae.W_enc.data[24:] *= 0.1  # positive half of the time, and never among the top: 40 dead latents
        run.activity.silent_tokens_F[24:] = 5000
        losses.append(run.step(rows())["aux_k"].item())
    assert seen == [8, 8, 16]  # D is 16
    assert losses[0] == losses[1] != losses[2]
    assert run_of(d_in=1, width=4, aux_k=None).step(rows(d_in=1))["aux_k"] == 0
    assert seen[-1] == 1


# int8


def test_a_floor_in_coarse_units_leaves_room_for_bfloat16() -> None:
    """A product that bfloat16 rounds down below the floor must still pass."""
    exact = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    found = Coarse(exact.to(torch.bfloat16)[:, None], torch.zeros(1).long(), torch.ones(4001), torch.zeros(4001, 1))
    below = exact - 1e-6 * exact.abs()
    assert (found.product_FB <= below[:, None]).any()  # rounding loses some
    assert (found.product_FB > found.floor(below.float())).all()


def test_int8_is_given_up_where_the_cut_fell_below_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as exact as bfloat16 with a slack of an eighth: candidates enough, of which some are below the floor."""
    from c2r.sae import selection as topk

    def coarse_product(x_BD: Tensor, W_FD: Tensor) -> Coarse:
        product_FB = (W_FD @ x_BD.T).bfloat16()
        slack_FG = torch.full((len(W_FD), len(x_BD) // above.GROUP), 0.12 * cut)  # pyright: ignore[reportOperatorIssue]
        return Coarse(product_FB, torch.arange(len(x_BD)), torch.ones(len(W_FD)), slack_FG)

    monkeypatch.setattr(topk, "coarse_product", coarse_product)
    W, bias = random_unit_rows(256, 32, 0), torch.zeros(256)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    select = BatchTopK()
    select.select(x @ W.T, bias, 2)
    cut = select.cut
    assert cut is not None
    for factor, kept in ((0.93, True), (0.87, False)):  # the first floor is 0.9 of the cut
        select.cut, select.move, select.failures = cut, 1.0, 0
        found = select.select_coarsely(factor * x, W, bias, 2)
        assert (found is not None) == kept
        if found is not None:
            best = (factor * x @ W.T).flatten().topk(128).values
            torch.testing.assert_close(found[1].sort(descending=True).values, best)
    assert select.cut == cut  # what was given up leaves no trace


def test_the_sparse_path_begins_below_three_in_a_hundred() -> None:
    config = SECTIONS["standard"](name="x", width=200)
    run = Run(config, TrainConfig(tokens=12800, batch=128, precision="float32"), 16)
    for share, sparse in ((0.031, False), (0.029, True)):
        run.activity.share = share
        assert isinstance(run.method.encode(run.seen(rows())).acts, Codes) == sparse
