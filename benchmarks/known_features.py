"""What SAEs find of known features, without C²R and with it: presets over seeds, mean and sample standard deviation.

    python benchmarks/known_features.py tree [--seeds 5] [--steps 3000] [--strengths 0.1 0.3 1] [--json]

A seed sets directions, initialisation and stream; baseline and C²R share it. Measured on 20,000 fresh activations in
the saved (inference) form. The traps are there to show where C²R fails.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import torch

from c2r.config.known_features import preset
from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS
from c2r.eval.recovery import Recovery
from c2r.known_features.generator import KnownFeatures
from c2r.known_features.presets import known_features
from c2r.known_features.stream import KNOWN, SyntheticStream
from c2r.training.run import Run

BATCH, EVALUATED = 512, 20_000
TOP_K, L1 = {"method": "batch_top_k"}, {"method": "standard", "l1": 0.03}
# name → parameters of the preset, of the SAE, and k as a multiple of the mean L0.
SETTINGS: dict[str, list[tuple[dict[str, Any], dict[str, Any], float]]] = {
    "tree": [({}, {**TOP_K, "width": width}, 1.0) for width in (112, 224)],
    "forest": [({}, {**TOP_K, "width": width}, share) for width in (128, 512, 2048) for share in (0.7, 1.0, 1.4)],
    "pair": [({"epsilon": epsilon}, {**L1, "width": 32}, 1.0) for epsilon in (0.005, 0.01, 0.02, 0.03)],
    "rotation_trap": [({"ratio": ratio}, {**L1, "width": 32}, 1.0) for ratio in (0, 0.5, 1, 2**0.5, 2, 4)],
    "over_merge_trap": [({"kappa": kappa}, {**TOP_K, "width": 48}, 1.0) for kappa in (0, 0.3, 0.5, 0.7)],
}
SHOWN = {
    "tree": ("ev", "l0", "alive", "absorption", "hole", "latents_per_parent", "mcc", "f1"),
    "forest": ("ev", "l0", "alive", "absorption", "hole", "latents_per_parent", "mcc", "f1"),
    "pair": ("ev", "l0", "absorption", "hole", "parent_cos", "child_cos", "child_f1", "mcc"),
    "rotation_trap": ("ev", "l0", "absorption", "hole", "parent_cos", "child_cos", "child_f1", "mcc"),
    "over_merge_trap": ("ev", "l0", "alive", "mcc", "uniqueness", "f1"),
}


def train_and_measure(
    features: KnownFeatures, sae: dict[str, Any], c2r: dict[str, Any] | None, seed: int, steps: int, lr: float
) -> dict[str, float]:
    """One SAE, trained and evaluated."""
    config = SECTIONS[sae["method"]].model_validate(
        {"name": "x", "dead_after_tokens": 100 * BATCH, "c2r": c2r, "seed": seed, **sae}
    )
    run = Run(config, TrainConfig(tokens=steps * BATCH, batch=BATCH, lr=lr, precision="float32"), features.d_in)
    stream = SyntheticStream(features, seed=seed)
    for x in stream.batches(BATCH, steps * BATCH):
        run.step(x[KNOWN])
    found = Recovery(run.export(stream.scale[KNOWN]), features)
    for sample in features.held_out(EVALUATED, seed):
        found.add(sample)
    fidelity = found.fidelity.metrics()
    best_G, latent_G = found.cosine_FG.max(0)
    return {
        "ev": fidelity["explained_variance"],
        "l0": fidelity["l0"],
        "alive": fidelity["frac_alive"],
        **found.metrics(),
        # Of the first two features, a parent and its child where the preset is about those.
        "parent_cos": best_G[0].item(),
        "child_cos": best_G[1].item(),
        "child_f1": found.f1_F[latent_G[1]].item() if found.feature_F[latent_G[1]] == 1 else 0.0,
    }


def over_seeds(seeds: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation of the finite ones; a preset may lack what a figure is about."""
    finite = [value for value in seeds if math.isfinite(value)]
    return {
        "mean": statistics.fmean(finite) if finite else math.nan,
        "sd": statistics.stdev(finite) if len(finite) > 1 else math.nan,
        "seeds": seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.1, 0.3, 1.0])
    parser.add_argument("--alphas", type=float, nargs="*", default=[1.0], help="0: the penalty looks at angles alone")
    parser.add_argument("--neighbors", choices=("exact", "lagged"), default="exact")
    parser.add_argument("--settings", type=int, nargs="*", help="which settings of the preset, counted from 0; all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    variants: list[dict[str, Any] | None] = [
        None,
        *(
            {"strength": strength, "alpha": alpha, "neighbors": args.neighbors}
            for alpha in args.alphas
            for strength in args.strengths
        ),
    ]
    rows = []
    chosen = range(len(SETTINGS[args.preset])) if args.settings is None else args.settings
    for number in chosen:
        parameters, sae, share = SETTINGS[args.preset][number]
        for c2r in variants:
            began, measured, k = time.monotonic(), [], {}
            for seed in range(args.seeds):
                features = known_features(preset(args.preset, feature_seed=seed, **parameters))
                k = {"k": max(1, round(share * features.mean_l0))} if sae["method"] == "batch_top_k" else {}
                measured.append(train_and_measure(features, sae | k, c2r, seed, args.steps, args.lr))
            figures = {name: over_seeds([row[name] for row in measured]) for name in measured[0]}
            rows.append({"parameters": parameters, "sae": sae | k, "c2r": c2r, "figures": figures})
            if not args.json:
                shown = " ".join(f"{n} {figures[n]['mean']:.3f}±{figures[n]['sd']:.3f}" for n in SHOWN[args.preset])
                label = "baseline" if c2r is None else f"ρ {c2r['strength']} α {c2r['alpha']}"
                seconds = (time.monotonic() - began) / args.seeds
                print(f"{parameters} width {sae['width']} {k} | {label} | {shown} | {seconds:.0f} s", flush=True)
    if args.json:
        settings = {name: getattr(args, name) for name in ("preset", "steps", "lr", "neighbors")}
        print(json.dumps({**settings, "rows": rows}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
