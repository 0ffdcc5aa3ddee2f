"""Where a training step's time goes, by kind of work: a table, and a picture with --plot docs/results/step-time.svg.

From PyTorch's profiler over a few steps; what no kernel accounts for (Python, dispatch, page faults) is "the rest".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from c2r.config.run import TrainConfig
from c2r.config.saes import BatchTopKConfig, ConsistencyConfig
from c2r.memory import keep_freed_memory
from c2r.training.run import Run
from step import activations, timed

STEPS, WARM_UP = 5, 20
"""Steps profiled, and steps before them: a fresh SAE's selection settles in the first dozen."""
KINDS = {
    "gathered sums and dots: decode, gradients": ("embedding_bag", "sampled_addmm"),
    "encoder's product": ("addmm", "qlinear"),
    "selection, gathers": ("amax", "gt", "nonzero", "index", "topk", "sort", "searchsorted", "bincount"),
    "neighbours' product": ("mm",),
    "Adam": ("adam",),
    "casts and copies": ("copy_", "fill_", "zero_", "cat"),
    "norms, projection, sums": ("norm", "mul", "add", "sum", "div", "sub", "pow", "addcmul", "clamp", "where"),
}
COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2", "#9d755d", "#bbb")


def kind_of(operation: str) -> str | None:
    name = operation.partition("::")[2]
    for kind, parts in KINDS.items():
        if any(name == part or name.strip("_") == part or (len(part) > 3 and part in name) for part in parts):
            return kind
    return None


def picture(milliseconds: dict[str, float], caption: str) -> str:
    """A bar cut into kinds of work, with a legend, as SVG."""
    total, x, bar, legend = sum(milliseconds.values()), 10.0, "", ""
    for row, ((kind, ms), color) in enumerate(zip(milliseconds.items(), COLORS, strict=False)):
        width = 680 * ms / total
        bar += f'<rect x="{x:.1f}" y="30" width="{width:.1f}" height="42" fill="{color}"/>'
        left, top = 10 + 350 * (row % 2), 96 + 20 * (row // 2)
        legend += f'<rect x="{left}" y="{top - 10}" width="12" height="12" fill="{color}"/>'
        legend += f'<text x="{left + 18}" y="{top}">{kind}: {ms:.0f} ms</text>'
        x += width
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="175" font-family="sans-serif" font-size="12">'
        f'<text x="10" y="20" font-weight="bold">{caption}</text>{bar}{legend}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("width", 16384), ("batch", 2048), ("k", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    x = activations(args.batch, args.d_in)
    config = BatchTopKConfig(name="x", width=args.width, k=args.k, k_anneal=0, c2r=ConsistencyConfig(strength=0.9))
    run = Run(config, TrainConfig(tokens=10**9, batch=args.batch, lr=1e-3), args.d_in)
    for _ in range(WARM_UP):
        run.step(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        whole = 1000 * timed(lambda: [run.step(x) for _ in range(STEPS)]) / STEPS
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        if event.key.startswith(("aten::", "onednn::")) and (kind := kind_of(event.key)):
            spent[kind] += event.self_cpu_time_total / 1000 / STEPS
    spent["the rest"] = max(0.0, whole - sum(spent.values()))
    for kind, ms in spent.items():
        print(f"{kind:<44}{ms:8.1f} ms")
    print(f"{'a step':<44}{whole:8.1f} ms")
    if args.plot:
        shape = f"D {args.d_in}, F {args.width}, B {args.batch}, K {args.k}"
        args.plot.write_text(picture(spent, f"One step with C²R, {shape}: {whole:.0f} ms"), encoding="utf-8")


if __name__ == "__main__":
    main()
