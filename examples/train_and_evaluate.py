"""Train a baseline and a C²R SAE on the embedded language model and evaluate both, through the Python API.

    python examples/train_and_evaluate.py [--out runs/example] [--tokens 300000]

The language model ships with c2r, so nothing is downloaded. The default of 300,000 tokens takes about a minute on two
CPU cores, and the figures are those of short training; `c2r demo` trains on 1.5 million.
"""

import argparse
from pathlib import Path
from typing import Any

import c2r

WIDTH = 1024


# --8<-- [start:config]
def run_config(out: Path, tokens: int) -> c2r.RunConfig:
    """The configuration that a YAML file would hold, as a dictionary."""
    sae: dict[str, Any] = {"method": "batch_top_k", "width": WIDTH, "k": 32}
    return c2r.RunConfig.model_validate(
        {
            "output": out,
            "model": {"name": "embedded", "layer": 0, "hook": "resid_post"},
            "data": {"source": "stdlib", "context": 128},  # the source code of Python's standard library
            "stream": {"window_tokens": 16_384},
            "train": {"tokens": tokens, "batch": 1024, "lr": 1e-3},
            "saes": [
                {"name": "baseline", **sae},
                {"name": "c2r", **sae, "c2r": {"strength": 0.9}},
            ],
        }
    )


# --8<-- [end:config]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--tokens", type=int, default=300_000, help="to train on")
    parser.add_argument("--evaluation-tokens", type=int, default=10_000)
    args = parser.parse_args()

    # --8<-- [start:use]
    folders = c2r.train(run_config(args.out, args.tokens))  # {"baseline": folder, "c2r": folder}
    figures = c2r.evaluate(list(folders.values()), suites=("core",), tokens=args.evaluation_tokens)
    for name, values in figures.items():
        shown = ", ".join(f"{key} {values[key]:.3f}" for key in ("ev", "ce_recovered", "l0", "alive"))
        sae = c2r.load(folders[name])
        cosine = c2r.nearest_neighbors(sae.W_dec).cosine.mean()
        print(f"{name}: {shown}, nearest cosine {cosine:.3f}")
    # --8<-- [end:use]
    print(f"SAE folders: {', '.join(map(str, folders.values()))}")


if __name__ == "__main__":
    main()
