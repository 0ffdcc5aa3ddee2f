"""The same step and the same evaluations on a GPU; `make test-gpu`."""

import json
from pathlib import Path

import pytest
import torch

from c2r.config import TrainConfig
from c2r.eval.absorbed import AbsorptionSettings
from c2r.eval.absorption import absorption
from c2r.eval.composition import composition
from c2r.eval.recovery import Recovery
from c2r.eval.suite import evaluate
from c2r.neighbors import nearest_neighbors
from c2r.train.run import Run
from test_absorption import random_case
from test_methods import METHODS, TREE, configured, plain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", list(METHODS))
def test_a_gpu_trains_as_a_cpu_does(method: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        train = TrainConfig(tokens=2560, batch=256, precision="float32", lr=1e-3)
        run = Run(configured(method, c2r={"strength": 0.3}), train, TREE.d_in, device=device)
        generator, scale = torch.Generator().manual_seed(0), TREE.scale()
        measured = [run.step((TREE.sample(256, generator).x_BD / scale).to(device))["loss"].item() for _ in range(10)]
        losses[device] = measured
        assert run.export().W_dec.device.type == device
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_neighbours_on_a_gpu() -> None:
    decoder = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nearest_neighbors(decoder.cuda()).cosine.cpu(), nearest_neighbors(decoder).cosine)


@pytest.mark.usefixtures("quick_meta")
def test_a_gpu_evaluates_as_a_cpu_does(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    suites = ("core", "splitting", "probing", "stability", "audit")
    task = tmp_path / "mine.jsonl"
    task.write_text("\n".join(json.dumps({"text": f"fox {i}" * (i % 2 + 1), "label": i % 2}) for i in range(60)))
    given = {"suites": suites, "tokens": 400, "probe_data": str(task)}
    found = [
        evaluate(list(tiny_run.values()), tmp_path / device, device=device, cache=tmp_path / f"{device}_cache", **given)
        for device in ("cpu", "cuda")
    ]
    for name, figures in found[0].items():
        for key, value in figures.items():
            # The meta-SAE is trained, and its selection may turn on a rounding.
            assert found[1][name][key] == pytest.approx(value, abs=0.1 if "composition" in key else 0.02), key


def test_absorption_on_a_gpu() -> None:
    (data, sae), few = random_case(0), AbsorptionSettings(min_classes=3)
    on_cpu, on_gpu = (absorption(data, sae.to(device), "abc", settings=few) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu.scored.fraction_n.cpu(), on_cpu.scored.fraction_n, rtol=1e-3, atol=1e-3)
    assert [one.split_latents for one in on_gpu.classes] == [one.split_latents for one in on_cpu.classes]


def test_recovery_on_a_gpu() -> None:
    figures = []
    for device in ("cpu", "cuda"):
        found = Recovery(plain("batch_top_k").to(device), TREE)
        for sample in TREE.held_out(2000):
            found.add(sample)
        figures.append(found.metrics())
        assert len(found.details()) == len(found.parents_P)
    assert figures[1] == pytest.approx(figures[0], abs=0.01)


def test_composition_on_a_gpu() -> None:
    rows = torch.eye(8).repeat(8, 1)
    assert composition(rows.cuda()).explained_variance > 0.99
