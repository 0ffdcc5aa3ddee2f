"""Whether a step allocates anything that grows with steps, and how much memory a shape needs.

    python benchmarks/memory.py                                                        2,000 steps at F 4096
    python benchmarks/memory.py --d-in 2304 --width 65536 --k 60 --steps 6 --early 3   the paper's shape

Resident memory of this process (Linux: /proc), batches drawn anew at every step as a run has them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from c2r.config.run import TrainConfig
from c2r.config.saes import BatchTopKConfig, ConsistencyConfig
from c2r.memory import keep_freed_memory
from c2r.training.run import Run
from step import activations


def resident() -> float:
    """Mebibytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = (("d-in", 512), ("width", 4096), ("batch", 2048), ("k", 32), ("steps", 2000), ("early", 100))
    for name, default in (*defaults, ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.default_allocator:
        keep_freed_memory()
    train = TrainConfig(tokens=10**9, batch=args.batch, lr=1e-3)
    c2r = ConsistencyConfig(strength=0.9)
    run = Run(BatchTopKConfig(name="x", width=args.width, k=args.k, k_anneal=0, c2r=c2r), train, args.d_in)
    pool = activations(4 * args.batch, args.d_in)
    held: dict[int, float] = {}
    seconds = []
    for step in range(1, args.steps + 1):
        x = pool[torch.randint(len(pool), (args.batch,))]
        start = time.perf_counter()
        run.step(x)
        seconds.append(time.perf_counter() - start)
        if step in (args.early, args.steps) or step % max(1, args.steps // 10) == 0:
            held[step] = round(resident(), 1)
    figures = {
        "resident_MiB": held,
        "growth_MiB": round(held[args.steps] - held[args.early], 1),
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "weights_gradients_adam_MiB": 2 * args.width * args.d_in * 4 * 4 / 2**20,
        "seconds_a_step": sorted(seconds)[len(seconds) // 2],
    }
    if args.json:
        print(json.dumps({"settings": vars(args), **figures}))
        return
    for name, value in figures.items():
        print(f"{name:<28}{value}")


if __name__ == "__main__":
    main()
