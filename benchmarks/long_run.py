"""Whether memory stays flat over a long run: the embedded model's activations, live, into a small SAE with C²R.

    python benchmarks/long_run.py                          20 M tokens; the curve in docs/guides/long-run-memory.svg
    python benchmarks/long_run.py --tokens 200_000         a few minutes' worth, to try it

The whole of `c2r train`, checkpoints included, in this process. Resident memory is sampled in a thread (Linux: /proc),
and growth is told from `--settled` minutes on: what a run allocates it has allocated by then.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from c2r.config.load import parse_config
from c2r.report.html import line_chart
from c2r.training.checkpoint import list_checkpoints
from c2r.training.trainer import train
from memory import resident

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Sampler(threading.Thread):
    """Resident memory of this process, every so many seconds."""

    def __init__(self, every: float) -> None:
        super().__init__(daemon=True)
        self.every, self.done = every, threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        """Sample until `done` is set."""
        began = time.monotonic()
        while not self.done.is_set():
            self.samples.append((round(time.monotonic() - began, 1), round(resident(), 1)))
            self.done.wait(self.every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 20_000_000), ("width", 1024), ("k", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--settled", type=float, default=3.0, help="minutes after which memory should be flat")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--output", type=Path, help="the run's folder, that a rerun resumes; default: temporary")
    parser.add_argument("--json", type=Path, help="where the figures and all samples go")
    parser.add_argument("--svg", type=Path, help="default: docs/guides/long-run-memory.svg for the full run, else none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measured(args, args.output or Path(temporary) / "run")
    samples = figures.pop("samples")
    for name, value in figures.items():
        print(f"{name:<28}{value}")
    if args.json:
        args.json.write_text(json.dumps({"settings": _settings(args), **figures, "samples": samples}) + "\n")
    svg = args.svg or (DOCS / "long-run-memory.svg" if args.tokens >= 20_000_000 else None)
    if svg:
        svg.write_text(drawn(samples, figures["tokens"]))
        print(f"curve: {svg}")


def measured(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Train, and what memory did meanwhile."""
    sae = {"name": "c2r", "width": args.width, "k": args.k, "c2r": {"strength": 0.3}}
    raw = {"output": str(output), "train": {"tokens": args.tokens, "lr": 1e-3, "log_every": 50}, "saes": [sae]}
    config = parse_config(raw, "benchmarks/long_run.py")
    sampler = Sampler(args.every)
    sampler.start()
    train(config)
    sampler.done.set()
    sampler.join()
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    settled = [size for at, size in sampler.samples if at >= 60 * args.settled] or [sampler.samples[-1][1]]
    half = len(settled) // 2
    return {
        "tokens": last["tokens"],
        "minutes": round(sampler.samples[-1][0] / 60, 1),
        "tokens_a_second": round(last["tokens"] / last["seconds"]),
        "checkpoints_left": len(list_checkpoints(output)),
        "MiB_settled": settled[0],
        "MiB_at_the_end": settled[-1],
        "MiB_least": min(settled),
        "MiB_most": max(settled),
        "MiB_second_half_over_first": round(_mean(settled[half:]) - _mean(settled[: half or 1]), 1),
        "samples": sampler.samples,
    }


def drawn(samples: list[tuple[float, float]], tokens: int) -> str:
    """The curve as an SVG file."""
    thinned = samples[:: max(1, len(samples) // 500)]
    figure = line_chart("", "minutes", {"MiB": [(at / 60, size) for at, size in thinned]})
    svg = figure[figure.index("<svg") : figure.index("</svg>")]
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11" ', 1)
    title = f"resident memory in MiB, {tokens / 1e6:.3g} M tokens"
    return f'{svg}<text x="50" y="20">{title}</text></svg>\n'


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


if __name__ == "__main__":
    main()
