"""The published trainers' numbers, reproduced through the ordinary `Run.step`.

`C2R_GOLDEN_DIR` names another directory in the same format.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from c2r.config import ConsistencyConfig, SAEConfig, TrainConfig
from c2r.penalty import consistency_penalty
from c2r.recipes import RECIPES
from c2r.train.run import Run

GOLDEN = Path(os.environ.get("C2R_GOLDEN_DIR", Path(__file__).parent / "golden"))
INDEX = json.loads((GOLDEN / "index.json").read_text())
PENALTIES = range(len(INDEX["penalty"]))


def method_of(case: str) -> str | None:
    """The recipe that a case's name begins with, the longest of those that fit."""
    return max((name for name in RECIPES if case.startswith(name)), key=len, default=None)


CASES = [case for case in INDEX if case != "penalty" and method_of(case)]


def configured(case: str) -> tuple[SAEConfig, TrainConfig]:
    """A case's published settings in c2r's words."""
    given = INDEX[case]["config"]
    batch = load_file(GOLDEN / f"{case}.safetensors")["x"].shape[1]
    c2r = ConsistencyConfig(
        **{"lambda": given["c2r_penalty"]},
        alpha=given.get("c2r_alpha", 1.0),
        every=given.get("aux_loss_interval", 1),
        start=given.get("aux_loss_start_step", 0),
        neighbors="exact",
    )
    sae = SAEConfig(
        name=case,
        method=method_of(case),  # type: ignore[arg-type]
        width=given["dict_size"],
        k=given["k"],
        k_anneal=0,
        threshold_start=given["threshold_start_step"],
        threshold_decay=0.999,
        dead_after_tokens=given.get("dead_feature_threshold", 10_000_000),
        aux_k=given.get("top_k_aux"),
        c2r=c2r if given["c2r_penalty"] else None,
    )
    train = TrainConfig(
        tokens=given["steps"] * batch, batch=batch, lr=given["lr"], warmup_steps=given["warmup_steps"], decay_from=1,
        precision="float32",
    )  # fmt: skip
    return sae, train


@pytest.mark.parametrize("case", CASES)
def test_published_run(case: str) -> None:
    arrays = load_file(GOLDEN / f"{case}.safetensors")
    config, train = configured(case)
    run = Run(config, train, arrays["x"].shape[2])
    run.sae.W_enc.data = arrays["init.W_enc"].T.clone()
    for name in ("b_enc", "W_dec", "b_dec"):
        getattr(run.sae, name).data = arrays[f"init.{name}"].clone()

    for x_BD, expected in zip(arrays["x"], INDEX[case]["losses"], strict=True):
        measured = run.step(x_BD)
        assert measured["reconstruction"].item() == pytest.approx(expected["l2_loss"], rel=1e-4)
        assert measured["loss"].item() == pytest.approx(expected["loss"], rel=1e-4)
        if config.c2r and measured["c2r"]:
            lam = INDEX[case]["config"]["c2r_penalty"]
            assert measured["c2r"].item() == pytest.approx(lam * config.c2r.every * expected["c2r_loss"], rel=1e-4)

    torch.testing.assert_close(run.sae.W_enc.data, arrays["final.W_enc"].T, rtol=0, atol=1e-4)
    for name in ("b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(run.sae, name).data, arrays[f"final.{name}"], rtol=0, atol=1e-4)
    assert run.threshold.item() == pytest.approx(arrays["final.threshold"].item(), abs=1e-4)


@pytest.mark.parametrize("number", PENALTIES)
def test_published_penalty(number: int) -> None:
    arrays, expected = load_file(GOLDEN / "penalty.safetensors"), INDEX["penalty"][number]
    acts = arrays[f"{number}.acts"].requires_grad_()
    decoder = arrays[f"{number}.W_dec"].requires_grad_()
    loss = consistency_penalty(acts, decoder, alpha=expected["alpha"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    for tensor, name in ((acts, "acts"), (decoder, "W_dec")):
        want = arrays[f"{number}.grad_{name}"]
        assert (tensor.grad - want).norm() <= 1e-5 * want.norm()
