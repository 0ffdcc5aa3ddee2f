"""What a training step costs, as ratios in one run: c2r's BatchTopK step beside the published one, dense.

    make bench            or            python benchmarks/step.py --width 16384 --json

Medians over interleaved rounds after warm-up, so that a noisy machine disturbs every row alike. The published step is
measured as the mean over its cycle of five, one of which has its C²R. `--default-allocator` leaves out what
`c2r train` asks of the C library (see `c2r.memory`), for every row. At the paper's shape a cycle of the published
step takes minutes:

    python benchmarks/step.py --d-in 2304 --width 65536 --k 60 --only floor lagged fp32 --cycles 1
    python benchmarks/step.py --d-in 2304 --width 65536 --k 60 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from c2r.config.run import TrainConfig
from c2r.config.saes import BatchTopKConfig, ConsistencyConfig
from c2r.memory import keep_freed_memory
from c2r.training.run import Run
from published import PublishedStep

LABELS = {
    "floor": "encoder's product, bf16 (the floor)",
    "floor32": "encoder's product, fp32",
    "plain": "c2r without C²R",
    "lagged": "c2r with C²R, lagged (default)",
    "exact": "c2r with C²R, exact",
    "two": "c2r, two SAEs on the same batch",
    "autocast": "published, bf16 autocast",
    "fp32": "published, fp32",
}


def timed(work: Callable[[], object]) -> float:
    """Seconds; a GPU's work is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
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
    parser.add_argument("--only", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--cycles", type=int, help="rounds of the published step; the same as --rounds if not given")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto", help="of c2r's product")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.default_allocator:
        keep_freed_memory()
    x = activations(args.batch, args.d_in).to(args.device)
    train = TrainConfig(tokens=10**9, batch=args.batch, lr=1e-3, precision=args.precision)

    def ours(c2r: ConsistencyConfig | None) -> Callable[[], object]:
        config = BatchTopKConfig(name="x", width=args.width, k=args.k, k_anneal=0, c2r=c2r)
        run = Run(config, train, args.d_in, device=args.device)
        return lambda: run.step(x)

    def published(autocast: bool) -> Callable[[], object]:
        step = PublishedStep(args.d_in, args.width, args.k, autocast=autocast, device=args.device)
        return lambda: [step(x) for _ in range(step.every)]

    def floor(dtype: torch.dtype) -> Callable[[], object]:
        x_low, W_low = x.to(dtype), torch.randn(args.width, args.d_in).to(args.device, dtype)
        return lambda: torch.nn.functional.linear(x_low, W_low)

    def two() -> Callable[[], object]:
        runs = [ours(ConsistencyConfig(strength=0.9)) for _ in range(2)]
        return lambda: [run() for run in runs]

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "floor": lambda: floor(torch.bfloat16),
        "floor32": lambda: floor(torch.float32),
        "plain": lambda: ours(None),
        "lagged": lambda: ours(ConsistencyConfig(strength=0.9)),
        "exact": lambda: ours(ConsistencyConfig(strength=0.9, neighbors="exact")),
        "two": two,
        "autocast": lambda: published(True),
        "fp32": lambda: published(False),
    }
    rows = {name: makers[name]() for name in args.only}
    times: dict[str, list[float]] = {name: [] for name in rows}
    warm_up = 3
    for round_number in range(args.rounds + warm_up):
        for name, work in rows.items():
            steps = 5 if name in ("autocast", "fp32") else 1
            counted = 0 <= round_number - warm_up < (args.cycles or args.rounds)
            if steps > 1 and not counted and (round_number or args.cycles):
                continue  # one cycle warms the published step up; where --cycles is given, none
            seconds = timed(work) / steps
            if round_number >= warm_up:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        "faster than published, bf16 autocast": ("autocast", "lagged"),
        "faster than published, fp32": ("fp32", "lagged"),
        "step with C²R over the floor": ("lagged", "floor"),
        "step with C²R over the fp32 product": ("lagged", "floor32"),
        "step with C²R over step without": ("lagged", "plain"),
        "two SAEs over one": ("two", "lagged"),
    }
    figures = {label: median[a] / median[b] for label, (a, b) in ratios.items() if a in median and b in median}
    if args.json:
        seconds = {LABELS[name]: value for name, value in median.items()}
        print(json.dumps({"settings": vars(args), "seconds": seconds, "ratios": figures}, ensure_ascii=False))
        return
    shape = f"D {args.d_in}, F {args.width}, B {args.batch}, K {args.k}"
    print(f"{shape}; {args.device}, {args.threads} threads, {args.rounds} rounds")
    for name, seconds in median.items():
        print(f"{LABELS[name]:<40}{1000 * seconds:9.1f} ms")
    for label, value in figures.items():
        print(f"{label:<40}{value:9.2f}")


if __name__ == "__main__":
    main()
