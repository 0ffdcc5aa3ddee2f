"""The same step and the same evaluations on a GPU; `make test-gpu`."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch

import c2r
from builders import known_run, run_config
from c2r.config.evaluations import AbsorptionSettings
from c2r.config.run import RunConfig, TrainConfig
from c2r.config.saes import SECTIONS
from c2r.eval.absorption.concepts import absorption
from c2r.eval.recovery import Recovery
from c2r.eval.splitting.composition import composition
from c2r.eval.suite import evaluate
from c2r.neighbors import nearest_neighbors
from c2r.training.run import Run
from c2r.training.signals import Stopped
from c2r.training.trainer import train
from small_runs import FREE_K, SCALE, TREE, configured, plain, random_case, signalled

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", list(SECTIONS))
def test_a_gpu_trains_as_a_cpu_does(method: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        settings = TrainConfig(tokens=2560, batch=256, precision="float32", lr=1e-3)
        run = Run(configured(method, c2r={"strength": 0.3}), settings, TREE.d_in, device=device)
        generator = torch.Generator().manual_seed(0)
        measured = [run.step((TREE.sample(256, generator).x_BD / SCALE).to(device))["loss"].item() for _ in range(10)]
        losses[device] = measured
        assert run.export().W_dec.device.type == device
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("method", FREE_K)
def test_the_sparse_path_on_a_gpu(method: str) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        settings = TrainConfig(tokens=256, batch=256, precision="float32")
        run = Run(configured(method, c2r={"strength": 0.3}), settings, TREE.d_in, device=device)
        run.activity.share = 0.0
        x_BD = TREE.sample(256, torch.Generator().manual_seed(0)).x_BD / SCALE
        losses.append(run.step(x_BD.to(device))["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("live", [False, True])
def test_a_run_on_a_gpu_is_stopped_and_goes_on(
    live: bool, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configured_run(name: str) -> RunConfig:
        config = run_config(tmp_path / name, tiny_models["llama"], corpus) if live else known_run(tmp_path / name)
        return config.model_copy(
            update={"train": config.train.model_copy(update={"device": "cuda", "precision": "auto"})}
        )

    train(configured_run("whole"))
    signalled(monkeypatch, {4: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(configured_run("parts"))
    train(configured_run("parts"))
    for name in ("baseline", "c2r"):
        one, other = (c2r.load(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert one.config["c2r"]["state"] == other.config["c2r"]["state"]
        torch.testing.assert_close(one.W_dec, other.W_dec, rtol=1e-3, atol=1e-3)  # sums come in any order there


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
        found = Recovery(copy.deepcopy(plain("batch_top_k")).to(device), TREE)
        for sample in TREE.held_out(2000):
            found.add(sample)
        figures.append(found.metrics())
        assert len(found.details()) == len(found.parents_P)
    assert figures[1] == pytest.approx(figures[0], abs=0.01)


def test_composition_on_a_gpu() -> None:
    rows = torch.eye(8).repeat(8, 1)
    assert composition(rows.cuda()).explained_variance > 0.99
