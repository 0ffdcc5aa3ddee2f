"""Small runs: each method on known features, runs that are stopped, and one that fills a cache."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import run_config
from c2r.config.known_features import preset
from c2r.config.run import RunConfig, TrainConfig
from c2r.config.saes import SECTIONS, SAEConfig
from c2r.eval.absorption.concepts import Labelled
from c2r.known_features.presets import known_features
from c2r.known_features.stream import KNOWN, SyntheticStream
from c2r.sae.model import SAE
from c2r.training.run import Run

TREE = known_features(preset("tree", parents=4, children=3, independent=8, d_in=24))

SCALE = SyntheticStream(TREE).scale[KNOWN]

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1": 0.05},
    "april_update": {"l1": 0.05},
    "p_anneal": {"l1": 0.05},
    "gated": {"l1": 0.05},
    "jump_relu": {"target_l0": 2, "bandwidth": 0.05},
}


def configured(method: str, **changes: Any) -> SAEConfig:
    settings = {"fractions": (0.125, 0.375, 0.5)} if method == "matryoshka_batch_top_k" else {}
    settings |= SETTINGS.get(method, {"k": 2})
    return SECTIONS[method].model_validate({"name": method, "width": TREE.features, **settings, **changes})


def trained(method: str, steps: int = 200, precision: str = "float32", **changes: Any) -> Run[Any]:
    config = configured(method, **changes)
    run = Run(config, TrainConfig(tokens=steps * 256, batch=256, lr=3e-3, precision=precision), TREE.d_in)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        run.step(TREE.sample(256, generator).x_BD / SCALE)
    return run


@functools.cache
def plain(method: str) -> SAE:
    """What `trained` leaves as it is, for several tests."""
    return trained(method).export()


def fresh(tokens: int = 4000) -> Tensor:
    return TREE.sample(tokens, torch.Generator().manual_seed(2)).x_BD / SCALE


def signalled(monkeypatch: pytest.MonkeyPatch, at: dict[int, list[int]]) -> None:
    """Have the process get signals while the second SAE is amid a step; each once."""
    original = Run.step

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.config.name == "c2r":
            for number in at.pop(self.step_number, []):
                os.kill(os.getpid(), number)
        return original(self, x)

    monkeypatch.setattr(Run, "step", step)


def changed(config: RunConfig, **train_section: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train_section)})


SAES = [
    {"name": "baseline", "width": 32, "k": 4},
    {"name": "first", "width": 32, "k": 4, "layer": 0, "hook": "mlp_out", "c2r": {"strength": 0.9}},
]


def cached_run(folder: Path, language_model: Path, corpus: Path, **changes: Any) -> RunConfig:
    changed = {
        "saes": SAES,
        "stream": {"window_tokens": 512, "model_rows": 8, "max_norm_multiple": 1.5},
        "cache": {"path": str(folder / "acts"), "shard_tokens": 600},
    } | changes
    return run_config(folder / "run", language_model, corpus, **changed)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def random_case(seed: int, n: int = 240, d: int = 12, width: int = 30, classes: int = 3) -> tuple[Labelled, SAE]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(classes, d, generator=g)[y] * 1.5 + torch.randn(n, d, generator=g)
    rows = torch.randn(width, d, generator=g)
    scale = 0.5 + torch.rand(width, 1, generator=g)
    sae = SAE(rows, -torch.rand(width, generator=g), rows * scale, torch.zeros(d), architecture="standard")
    return Labelled(x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :]), sae


FREE_K = ("standard", "april_update", "p_anneal", "jump_relu", "gated")
