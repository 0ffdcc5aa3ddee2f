"""From which share of firing latents on the sparse step of JumpReLU and the L1 methods beats the dense one.

    python benchmarks/sparse.py            or with  --json

Both ways for the same SAE at biases that make more or fewer latents fire; medians over interleaved rounds. The crossing
is `SPARSE_BELOW` in `c2r.training.run`.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS
from c2r.memory import keep_freed_memory
from c2r.training.run import Run
from step import activations, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("width", 16384), ("batch", 2048), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", default=["standard", "jump_relu"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    x = activations(args.batch, args.d_in)
    rows = []
    for method in args.methods:
        for share in (0.002, 0.005, 0.01, 0.02, 0.04, 0.08):
            more = {"target_l0": 32} if method == "jump_relu" else {}
            config = SECTIONS[method](name="x", width=args.width, **more)
            run = Run(config, TrainConfig(tokens=10**9, batch=args.batch), args.d_in)
            with torch.no_grad():  # biases so that about this share fires; a learning rate of 0 keeps them
                product = run.encoder.scores(x[:256]).flatten().float()
                run.sae.b_enc -= product[torch.randperm(len(product))[:100_000]].quantile(1 - share)  # pyright: ignore[reportAttributeAccessIssue]
            run.train = run.train.model_copy(update={"lr": 0.0})
            times: dict[bool, list[float]] = {True: [], False: []}
            for number in range(args.rounds + 1):
                for sparse in times:
                    run.activity.share = 0.0 if sparse else 1.0
                    seconds = timed(lambda run=run: run.step(x))
                    if number:
                        times[sparse].append(seconds)
            dense, sparse = (statistics.median(times[way]) for way in (False, True))
            figures = {"dense": dense, "sparse": sparse, "ratio": dense / sparse}
            rows.append({"method": method, "share": run.activity.share, **figures})
    if args.json:
        print(json.dumps({"settings": vars(args), "rows": rows}))
        return
    for row in rows:
        print(
            f"{row['method']:<12} {100 * row['share']:6.2f} % fire   dense {1000 * row['dense']:8.0f} ms   "
            f"sparse {1000 * row['sparse']:8.0f} ms   {row['ratio']:5.2f} ×"
        )


if __name__ == "__main__":
    main()
