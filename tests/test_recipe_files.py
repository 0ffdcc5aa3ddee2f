"""Recipes parse, and say what the paper's runs were."""

import re
from pathlib import Path

import pytest

from builders import ROOT
from c2r.activations.cache import origin_of
from c2r.config.hooks import HookPoint
from c2r.config.load import load_config
from c2r.config.study import load_study
from c2r.penalty import strength_of_lambda

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
POINTS = {"gemma-2-2b": 12, "qwen3-8b": 18, "llama-3-8b": 16}


def test_every_recipe_parses() -> None:
    assert {path.stem for path in RECIPES} == {*POINTS, "smollm2-135m"}
    for path in RECIPES:
        assert f"c2r train recipes/{path.name}" in re.sub(" +", " ", path.read_text())
        load_config(path)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in POINTS], ids=lambda path: path.stem)
def test_a_published_recipe_has_the_published_settings(path: Path) -> None:
    config = load_config(path, ("cache.path=somewhere",))  # as its second command has it
    assert config.points == (HookPoint(POINTS[path.stem], "resid_post"),)
    assert config.train.steps == 244_141
    assert (config.train.batch, config.train.lr, config.train.warmup_steps) == (2048, 2e-4, 1000)
    assert (config.data.model_dump()["context"], config.stream.max_norm_multiple) == (1024, 10)
    assert {(sae.width, sae.model_dump()["k"]) for sae in config.saes} == {(65_536, 80)}
    c2r = config.saes[1].c2r
    assert c2r is not None
    assert c2r.lam is not None
    assert strength_of_lambda(c2r.lam, batch=2048, width=65_536) == pytest.approx(0.884, abs=1e-3)
    assert (c2r.alpha, c2r.every, c2r.start, c2r.neighbors) == (1, 5, 0, "chunked")
    assert origin_of(config)["cache"]["dtype"] == "bfloat16"
    assert "Nothing of this has been run on a GPU" in path.read_text()


def test_the_studies_parse_and_agree_with_their_harvest() -> None:
    harvest = load_config(ROOT / "studies" / "smollm2-135m-harvest.yaml")
    for layer in (5, 12):
        study = load_study(ROOT / "studies" / "smollm2-135m.yaml", (f"run.model.layer={layer}",))
        for run in study.runs():
            assert origin_of(run) == origin_of(harvest)
            assert set(run.points) <= set(harvest.points)
