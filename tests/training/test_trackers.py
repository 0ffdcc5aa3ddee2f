"""Tracking: metrics as in metrics.jsonl, packages imported only if configured, errors that name the missing extra."""

import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from builders import known_run, run_config
from c2r.training.run import Run
from c2r.training.signals import Stopped
from c2r.training.trainer import train

ASKED = {"tensorboard": True, "wandb": {"project": "saes", "mode": "offline"}}


class Recorded:
    """Fake of both packages that records its calls."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.scalars: dict[str, list[tuple[str, float, int]]] = {}
        self.purged: list[int] = []
        self.ended = 0

    def wandb(self) -> types.ModuleType:
        module = types.ModuleType("wandb")

        def init(**options: Any) -> Any:
            self.begun.append(options)
            run = types.SimpleNamespace()
            run.log = lambda figures, step: self.logged.append((step, figures))
            run.finish = lambda: setattr(self, "ended", self.ended + 1)
            return run

        module.init = init  # pyright: ignore[reportAttributeAccessIssue]
        return module

    def tensorboard(self) -> types.ModuleType:
        module = types.ModuleType("torch.utils.tensorboard")
        recorded = self

        class SummaryWriter:
            def __init__(self, folder: str, purge_step: int) -> None:
                self.name = Path(folder).name
                assert Path(folder).parent.name == "tensorboard"
                recorded.purged.append(purge_step)

            def add_scalar(self, name: str, value: float, step: int) -> None:
                recorded.scalars.setdefault(self.name, []).append((name, value, step))

            def close(self) -> None:
                recorded.ended += 1

        module.SummaryWriter = SummaryWriter  # pyright: ignore[reportAttributeAccessIssue]
        return module


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", found.wandb())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", found.tensorboard())
    return found


def test_trackers_get_what_metrics_jsonl_has(recorded: Recorded, tmp_path: Path) -> None:
    config = known_run(tmp_path / "run", tracking=ASKED)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        figures = {name: value for name, value in line.items() if name not in ("sae", "step", "seconds")}
        figures = {name: value for name, value in figures.items() if value is not None}
        assert (line["step"], {f"{line['sae']}/{name}": value for name, value in figures.items()}) in recorded.logged
        scalars = {name: v for name, v, step in recorded.scalars[line["sae"]] if step == line["step"]}
        assert scalars == figures
    assert len(recorded.logged) == len(lines)
    assert recorded.begun[0]["project"] == "saes"
    assert recorded.begun[0]["name"] == "run"
    assert recorded.begun[0]["config"]["saes"][1]["c2r"]["strength"] == 0.9
    assert recorded.ended == 3


def test_a_resumed_run_goes_on_in_its_trackers(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.step

    def step(self: Run[Any], x: Any) -> Any:
        if self.step_number == 6 and self.config.name == "c2r" and len(recorded.begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, x)

    monkeypatch.setattr(Run, "step", step)
    config = known_run(tmp_path / "run", tracking=ASKED)
    with pytest.raises(Stopped):
        train(config)
    train(config)
    assert recorded.begun[0]["id"] == recorded.begun[1]["id"]
    assert recorded.begun[1]["resume"] == "allow"
    assert recorded.purged == [1, 1, 8, 8]
    assert [step for step, _ in recorded.logged] == [step for step in range(1, 25) for _ in config.saes]
    train(config, overwrite=True)
    assert recorded.begun[2]["id"] != recorded.begun[0]["id"]


@pytest.mark.parametrize("name", list(ASKED))
def test_a_missing_package_is_told_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"tracking\.{name}: the package is not installed .*'c2r\[{name}\]'"):
        train(known_run(tmp_path / "run", tracking={name: ASKED[name]}))
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_that_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it would fail
    train(known_run(tmp_path / "run"))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "wandb").exists()


def test_tracking_may_be_switched_amid_a_run(tmp_path: Path) -> None:
    from c2r.training.folder import as_written, differences

    assert differences(as_written(known_run(tmp_path, tracking=ASKED)), known_run(tmp_path)) == []


def test_every_curve_can_be_drawn_from_the_lines(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Each line has all metrics of a step, including the terms of the loss, which sum to the loss."""
    train(run_config(tmp_path / "run", tiny_models["llama"], corpus))
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert set(line) >= {"sae", "step", "tokens", "seconds", "loss", "reconstruction", "aux_k", "c2r", "ev", "l0"}
        assert line["loss"] == pytest.approx(line["reconstruction"] + line["aux_k"] + line["c2r"], rel=1e-5)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_the_packages_themselves(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the packages are installed (they are extras): their files can be read back."""
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(known_run(tmp_path / "run", tracking={package: ASKED[package]}))
    if package == "wandb":
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
        return
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "c2r"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["ev"]) for line in lines if line["sae"] == "c2r"]
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("ev")] == expected
