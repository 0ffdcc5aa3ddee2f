"""Every method on the synthetic tree, with and without C²R: whether the penalty acts, and what it costs.

    python benchmarks/methods.py [--steps 2000] [--strength 0.1] [--json]

SAEs as wide as there are features, the same seed for both. EV, L0 and alive are measured on fresh activations with the
saved (inference) form; the mean nearest-neighbour cosine over alive latents is what C²R minimises.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from c2r.config.known_features import preset
from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS
from c2r.eval.core import Fidelity
from c2r.eval.splitting.cofiring import Cofiring
from c2r.known_features.generator import KnownFeatures
from c2r.known_features.presets import known_features
from c2r.known_features.stream import KNOWN, SyntheticStream
from c2r.training.run import Run

# What each method needs to reach about the tree's own L0; everything else is its default.
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1": 0.05},
    "april_update": {"l1": 0.05},
    "p_anneal": {"l1": 0.05},
    "gated": {"l1": 0.05},
    "jump_relu": {"target_l0": 5, "bandwidth": 0.03},
}


def train_and_measure(
    method: str, c2r: dict[str, Any] | None, steps: int, tree: KnownFeatures, batch: int = 512
) -> dict[str, float]:
    """One SAE, trained and evaluated."""
    settings = SETTINGS.get(method, {"k": round(tree.mean_l0)})
    config = SECTIONS[method].model_validate(
        {"name": method, "width": tree.features, "dead_after_tokens": 100 * batch, "c2r": c2r, **settings}
    )
    run = Run(config, TrainConfig(tokens=steps * batch, batch=batch, lr=3e-3, precision="float32"), tree.d_in)
    stream = SyntheticStream(tree, seed=1)
    for x in stream.batches(batch, steps * batch):
        run.step(x[KNOWN])
    sae = run.export()
    x = next(tree.held_out(20_000, batch=20_000)).x_BD / stream.scale[KNOWN]
    with torch.no_grad():
        acts = sae.encode(x)
        fidelity, pairs = Fidelity(sae.width, sae.d_in), Cofiring(sae.W_dec)
        fidelity.add(x, sae.decode(acts), acts)
        pairs.add(acts)
    measured = fidelity.metrics()
    return {
        "ev": measured["explained_variance"],
        "l0": measured["l0"],
        "alive": measured["frac_alive"],
        "max_cos_mean": pairs.metrics()["max_cos_mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--methods", nargs="*", default=list(SECTIONS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    tree, rows = known_features(preset("tree")), []
    for method in args.methods:
        for c2r in (None, {"strength": args.strength}):
            rows.append({"method": method, "c2r": bool(c2r), **train_and_measure(method, c2r, args.steps, tree)})
            if not args.json:
                shown = " ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if isinstance(v, float))
                print(f"{method:<24}{'C²R' if c2r else 'baseline':<10}{shown}", flush=True)
    if args.json:
        print(json.dumps({"steps": args.steps, "strength": args.strength, "true_l0": tree.mean_l0, "rows": rows}))


if __name__ == "__main__":
    main()
