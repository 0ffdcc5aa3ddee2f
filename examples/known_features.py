"""Recovery of known features: train on activations whose true features are known, and count what was found.

    python examples/known_features.py [--out runs/known] [--tokens 400000]

The `tree` preset has 16 parents with 4 mutually exclusive children each, and 32 independent features. A child is on
only when its parent is, so an ordinary SAE saves active latents by letting the child's latent carry the parent too: the
parent is absorbed. The script prints how often that happens, for a baseline and for C²R. About 20 seconds on one CPU
core.
"""

import argparse
from pathlib import Path
from typing import Any

import c2r

SHOWN = {
    "ev": "explained variance",
    "known_absorption": "absorption of known parents",
    "latents_per_parent": "latents per known parent",
    "mcc": "mean correlation (MCC) with known features",
}


def run_config(out: Path, tokens: int) -> c2r.RunConfig:
    """As many latents as features, and as many active ones as features are on at once."""
    sae: dict[str, Any] = {"method": "batch_top_k", "width": 112, "k": 5, "dead_after_tokens": 51_200}
    return c2r.RunConfig.model_validate(
        {
            "output": out,
            "data": {"source": "synthetic", "preset": "tree"},
            "train": {"tokens": tokens, "batch": 512, "lr": 1e-2, "precision": "float32"},
            "saes": [
                {"name": "baseline", **sae},
                {"name": "c2r", **sae, "c2r": {"strength": 0.3}},
            ],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/known"))
    parser.add_argument("--tokens", type=int, default=400_000, help="to train on")
    args = parser.parse_args()
    folders = c2r.train(run_config(args.out, args.tokens))
    figures = c2r.evaluate(list(folders.values()), suites=("recovery",))
    for key, label in SHOWN.items():
        print(f"{label}: " + ", ".join(f"{name} {values[key]:.3f}" for name, values in figures.items()))


if __name__ == "__main__":
    main()
