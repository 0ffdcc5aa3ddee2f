"""What a training step costs, as ratios in one run: BatchTopK with and without C²R beside the encoder's own product.

    make bench            or            python benchmarks/step.py --width 4096 --json

Medians over interleaved rounds after warm-up, so that a noisy machine disturbs every row alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from c2r.config import TrainConfig
from c2r.methods import BatchTopKConfig, ConsistencyConfig
from c2r.train.run import Run


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("width", 4096), ("batch", 2048), ("k", 32), ("rounds", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2 * args.d_in, args.d_in, generator=generator))
    codes = torch.rand(args.batch, 2 * args.d_in, generator=generator).pow(32)
    x = codes @ directions
    x = x / x.square().sum(1).mean().sqrt()
    train = TrainConfig(tokens=10**9, batch=args.batch, lr=1e-3)

    def step(c2r: ConsistencyConfig | None) -> Callable[[], object]:
        run = Run(BatchTopKConfig(name="x", width=args.width, k=args.k, k_anneal=0, c2r=c2r), train, args.d_in)
        return lambda: run.step(x)

    x_low, W_low = x.bfloat16(), torch.randn(args.width, args.d_in).bfloat16()
    rows = {
        "encoder product, bf16": lambda: x_low @ W_low.T,
        "step without C²R": step(None),
        "step with C²R, lagged neighbours": step(ConsistencyConfig(strength=0.9)),
        "step with C²R, exact neighbours": step(ConsistencyConfig(strength=0.9, neighbors="exact")),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_number in range(args.rounds + 3):
        for name, work in rows.items():
            seconds = timed(work)
            if round_number >= 3:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    plain = medians["step without C²R"]
    if args.json:
        print(json.dumps({"shape": vars(args), "median_seconds": medians}, ensure_ascii=False))
        return
    print(f"D {args.d_in}, F {args.width}, B {args.batch}, K {args.k}, {args.threads} threads, {args.rounds} rounds")
    for name, seconds in medians.items():
        print(f"{name:<36}{1000 * seconds:8.1f} ms{seconds / plain:8.2f} × the step without C²R")


if __name__ == "__main__":
    main()
