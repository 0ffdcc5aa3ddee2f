"""What a training step costs, as ratios in one run: c2r's BatchTopK step beside the published one, dense.

    make bench            or            python benchmarks/step.py --width 16384 --json

Medians over interleaved rounds after warm-up, so that a noisy machine disturbs every row alike. The published step is
measured as the mean over its cycle of five, one of which has its C²R. `--default-allocator` leaves out what
`c2r train` asks of the C library (see `c2r.train.memory`), for every row.
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
from c2r.train.memory import keep_freed_memory
from c2r.train.run import Run
from published import PublishedStep

FLOOR, PLAIN, LAGGED = "encoder's product, bf16 (the floor)", "c2r without C²R", "c2r with C²R, lagged (default)"
EXACT, AUTOCAST, FP32 = "c2r with C²R, exact", "published, bf16 autocast", "published, fp32"


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def activations(batch: int, d_in: int) -> torch.Tensor:
    """Sparse sums of unit directions, mean square norm 1."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2 * d_in, d_in, generator=generator))
    x = torch.rand(batch, 2 * d_in, generator=generator).pow(32) @ directions
    return x / x.square().sum(1).mean().sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("width", 16384), ("batch", 2048), ("k", 32), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.default_allocator:
        keep_freed_memory()
    x = activations(args.batch, args.d_in)
    train = TrainConfig(tokens=10**9, batch=args.batch, lr=1e-3)

    def ours(c2r: ConsistencyConfig | None) -> Callable[[], object]:
        run = Run(BatchTopKConfig(name="x", width=args.width, k=args.k, k_anneal=0, c2r=c2r), train, args.d_in)
        return lambda: run.step(x)

    def published(autocast: bool) -> Callable[[], object]:
        step = PublishedStep(args.d_in, args.width, args.k, autocast=autocast)
        return lambda: [step(x) for _ in range(step.every)]

    x_low, W_low = x.bfloat16(), torch.randn(args.width, args.d_in).bfloat16()
    rows: dict[str, tuple[Callable[[], object], int]] = {
        FLOOR: (lambda: torch.nn.functional.linear(x_low, W_low), 1),
        PLAIN: (ours(None), 1),
        LAGGED: (ours(ConsistencyConfig(strength=0.9)), 1),
        EXACT: (ours(ConsistencyConfig(strength=0.9, neighbors="exact")), 1),
        AUTOCAST: (published(True), 5),
        FP32: (published(False), 5),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    warm_up = 3
    for round_number in range(args.rounds + warm_up):
        for name, (work, steps) in rows.items():
            if steps > 1 and 0 < round_number < warm_up:
                continue  # one cycle warms the published step up
            seconds = timed(work) / steps
            if round_number >= warm_up:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        "faster than published, bf16 autocast": median[AUTOCAST] / median[LAGGED],
        "faster than published, fp32": median[FP32] / median[LAGGED],
        "step with C²R over the floor": median[LAGGED] / median[FLOOR],
        "share of C²R in the step": 1 - median[PLAIN] / median[LAGGED],
    }
    if args.json:
        print(json.dumps({"settings": vars(args), "seconds": median, "ratios": figures}, ensure_ascii=False))
        return
    print(f"D {args.d_in}, F {args.width}, B {args.batch}, K {args.k}, {args.threads} threads, {args.rounds} rounds")
    for name, seconds in median.items():
        print(f"{name:<40}{1000 * seconds:9.1f} ms")
    for name, value in figures.items():
        print(f"{name:<40}{value:9.2f}")


if __name__ == "__main__":
    main()
