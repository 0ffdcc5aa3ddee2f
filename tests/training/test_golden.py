"""Reproduces the published trainers' numbers with `Run.step`.

`C2R_GOLDEN_DIR` names another directory in the same format.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import ROOT
from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS, ConsistencyConfig, SAEConfig
from c2r.penalty import consistency_penalty
from c2r.training.run import Run

GOLDEN = Path(os.environ.get("C2R_GOLDEN_DIR", ROOT / "tests" / "golden"))
INDEX = json.loads((GOLDEN / "index.json").read_text())
PENALTIES = range(len(INDEX["penalty"]))


CASES = [case for case in INDEX if case != "penalty"]
# Published names of settings, losses and weights → c2r's names.
SETTINGS = {
    "l1_penalty": "l1", "sparsity_warmup_steps": "sparsity_warmup_steps", "k": "k", "auxk_alpha": "aux_coefficient",
    "threshold_start_step": "threshold_start", "threshold_beta": "threshold_decay", "top_k_aux": "aux_k",
    "dead_feature_threshold": "dead_after_tokens", "group_fractions": "fractions", "group_weights": "weights",
    "orthogonality_penalty": "orthogonality", "target_l0": "target_l0", "bandwidth": "bandwidth",
    "sparsity_penalty": "sparsity_coefficient",
}  # fmt: skip
LOSSES = {
    "l2_loss": "reconstruction", "mse_loss": "reconstruction", "auxk_loss": "aux_k", "orth_loss": "orthogonality",
    "sparsity_loss": "l1", "aux_loss": "gate_reconstruction", "loss": "loss",
}  # fmt: skip
WEIGHTS = {
    "W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec", "b_enc": "b_enc", "b_gate": "b_enc", "b_mag": "b_mag",
    "r_mag": "r_mag",
}  # fmt: skip


def method_of(case: str) -> str:
    """The longest method name with which a case's name begins."""
    return max((name for name in SECTIONS if case.startswith(name)), key=len)


def configured(case: str) -> tuple[SAEConfig, TrainConfig]:
    """A case's published settings under c2r's names."""
    given = INDEX[case]["config"]
    batch = load_file(GOLDEN / f"{case}.safetensors")["x"].shape[1]
    method = SECTIONS[method_of(case)]
    c2r = ConsistencyConfig.model_validate(
        {
            "lambda": given["c2r_penalty"],
            "alpha": given.get("c2r_alpha", 1.0),
            "every": given.get("aux_loss_interval", 1),
            "start": given.get("aux_loss_start_step", 0),
            "neighbors": "exact",
        }
    )
    defaults = {"k_anneal": (given.get("k_anneal_steps") or 0) / given["steps"], "threshold_decay": 0.999}
    settings = {name: value for name, value in defaults.items() if name in method.model_fields}
    settings |= {ours: given[theirs] for theirs, ours in SETTINGS.items() if given.get(theirs) is not None}
    if method is SECTIONS["jump_relu"]:
        settings["l0_gradient"] = "published"
    sae = method(name=case, width=given["dict_size"], c2r=c2r if given["c2r_penalty"] else None, **settings)
    train = TrainConfig(
        tokens=given["steps"] * batch,
        batch=batch,
        lr=given["lr"],
        warmup_steps=given["warmup_steps"],
        decay_from=1 if given.get("decay_start") is None else given["decay_start"] / given["steps"],
        precision="float32",
    )
    return sae, train


@pytest.mark.parametrize("case", CASES)
def test_published_run(case: str) -> None:
    arrays = load_file(GOLDEN / f"{case}.safetensors")
    config, train = configured(case)
    run, early = (Run(config, train, arrays["x"].shape[2]) for _ in range(2))
    ours = {theirs: name for theirs, name in WEIGHTS.items() if f"init.{theirs}" in arrays}
    if config.method == "jump_relu":
        ours["threshold"] = "threshold"
    for theirs, name in ours.items():
        weight = arrays[f"init.{theirs}"]
        for started in (run, early):
            getattr(started.sae, name).data.copy_(weight.T if theirs == "W_enc" else weight)
    # The `top_k` case logged step 0 before its trainer had set b_dec to the median, the others after.
    early.fresh = False

    given = INDEX[case]["config"]
    for step, (x_BD, expected) in enumerate(zip(arrays["x"], INDEX[case]["losses"], strict=True)):
        measured = run.step(x_BD)
        if (
            step == 0
            and config.method == "top_k"
            and measured["loss"].item() != pytest.approx(expected["loss"], rel=1e-4)
        ):
            measured = early.step(x_BD)
        # The published trainers log some losses before their weight and warm-up.
        weight = {
            "aux_k": given.get("auxk_alpha") or 1 / 32,
            "orthogonality": given.get("orthogonality_penalty", 0.25),
            "l1": given.get("l1_penalty", 0) * min(step / max(given.get("sparsity_warmup_steps", 0), 1), 1.0),
        }
        for theirs, name in LOSSES.items():
            if theirs in expected and not (theirs == "l2_loss" and "mse_loss" in expected):
                wanted = weight.get(name, 1.0) * expected[theirs]
                assert measured[name].item() == pytest.approx(wanted, rel=1e-4, abs=1e-9), theirs
        if measured["c2r"]:
            c2r = given["c2r_penalty"] * given.get("aux_loss_interval", 1) * expected["c2r_loss"]
            assert measured["c2r"].item() == pytest.approx(c2r, rel=1e-4)

    for theirs, name in ours.items():
        weight = getattr(run.sae, name).data
        final = arrays[f"final.{theirs}"]
        torch.testing.assert_close(weight.T if theirs == "W_enc" else weight, final, rtol=0, atol=1e-4)
    if "final.threshold" in arrays and config.method != "jump_relu":
        assert run.memory.threshold.item() == pytest.approx(arrays["final.threshold"].item(), abs=1e-4)


def test_published_cases_cover_the_published_methods() -> None:
    published = set(SECTIONS) - {"p_anneal", "abs_top_k"}
    assert {method_of(case) for case in CASES} <= published
    if "C2R_GOLDEN_DIR" not in os.environ:
        assert {method_of(case) for case in CASES} == published


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
