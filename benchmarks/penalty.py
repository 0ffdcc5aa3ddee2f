"""What C²R alone costs, forward and backward: c2r's with an exact search beside the published algorithm, and how its
cost in training (lagged neighbours) grows with the width.

    python benchmarks/penalty.py             or with  --json,  --plot docs/results/penalty-cost.svg

Medians over interleaved rounds after warm-up. The published search is chunked; results, not times, are compared in fp64
on 8192 latents, one chunk of it, where it is exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from c2r.config.saes import BatchTopKConfig, ConsistencyConfig
from c2r.kernels.codes import Codes, Support
from c2r.machine import quick_dtype
from c2r.memory import keep_freed_memory
from c2r.neighbors import NeighborTable, renewed_rows
from c2r.penalty import consistency_penalty
from c2r.report.html import line_chart
from c2r.sae.model import SAE
from c2r.training.consistency import Consistency
from published import chunked_penalty
from step import timed

Gradients = tuple[Tensor, Tensor, Tensor]
WIDTHS = (4096, 8192, 16384, 32768, 65536)


def with_gradients(penalty: Callable[[Tensor, Tensor], Tensor], acts: Tensor, decoder: Tensor) -> Gradients:
    acts, decoder = acts.detach().requires_grad_(), decoder.detach().requires_grad_()
    value = penalty(acts, decoder)
    return (value.detach(), *torch.autograd.grad(value, (acts, decoder)))  # pyright: ignore[reportReturnType]


def sparse_acts(batch: int, width: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(width, (batch, k), generator=generator)
    return torch.zeros(batch, width).scatter_(1, places, torch.rand(batch, k, generator=generator))


def alone(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each form, and how far results lie apart."""
    acts = sparse_acts(args.batch, args.width, args.k)
    decoder = torch.nn.functional.normalize(
        torch.randn(args.width, args.d_in, generator=torch.Generator().manual_seed(1))
    )
    forms: dict[str, Callable[[], Gradients]] = {
        "published, chunks of 8192": lambda: with_gradients(chunked_penalty, acts, decoder),
        "c2r, exact": lambda: with_gradients(consistency_penalty, acts, decoder),
        "c2r, exact, acts as Codes": lambda: of_codes(acts, decoder),
    }
    seconds = medians(forms, args.rounds)
    # In fp32 two neighbours may be equally near but for rounding; then either choice is right, and gradients differ.
    few = min(args.width, 8192)
    some, rows = acts[:, :few].double(), decoder[:few].double()
    ours = with_gradients(consistency_penalty, some, rows)
    theirs = with_gradients(lambda a, d: chunked_penalty(a, d, chunk=few), some, rows)
    apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))
    return seconds | {
        "faster than published": seconds["published, chunks of 8192"] / seconds["c2r, exact"],
        "largest relative difference of value and gradients": apart,
    }


def of_codes(acts: Tensor, decoder: Tensor) -> Gradients:
    tokens, latents = acts.nonzero(as_tuple=True)
    support = Support(latents, tokens, *acts.shape)
    return with_gradients(lambda v, d: consistency_penalty(Codes(v, support), d), acts[tokens, latents], decoder)


def medians(forms: dict[str, Callable[[], Gradients]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + warm_up):
        for name, work in forms.items():
            seconds = timed(work)
            if number >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def in_training(args: argparse.Namespace) -> dict[int, float]:
    """Seconds a step of the lagged table and the penalty on N = B·K codes, by width."""
    seconds = {}
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(0)
        decoder = torch.nn.functional.normalize(torch.randn(width, args.d_in, generator=generator))
        sae = SAE(decoder, torch.zeros(width), decoder.clone(), torch.zeros(args.d_in), architecture="standard")
        latents = torch.randint(width, (args.batch, args.k), generator=generator).sort(dim=1).values.flatten()
        tokens = torch.arange(args.batch).repeat_interleave(args.k)
        acts = Codes(torch.rand(len(latents), generator=generator), Support(latents, tokens, args.batch, width))
        config = BatchTopKConfig(name="x", width=width, k=args.k, c2r=ConsistencyConfig(strength=1.0))
        term = Consistency(config, args.d_in, seed=0)
        table = NeighborTable(rows=renewed_rows(width, 10**6), dtype=quick_dtype(torch.device("cpu")))
        # The first refresh is a whole search, made once in a run; it is no part of a step.
        others = torch.arange(width).roll(1)
        table.load_state_dict(table.state_dict() | {"index_F": others, "shortlist_MF": others.repeat(32, 1)})

        def step(
            sae: SAE = sae, acts: Codes = acts, term: Consistency = term, table: NeighborTable = table
        ) -> Gradients:
            values = acts.values_N.detach().requires_grad_()
            loss = term.term(Codes(values, acts.support), sae.W_dec, table.refresh(sae.W_dec), args.batch, 0)
            return (loss, *torch.autograd.grad(loss, (values, sae.W_dec)))  # pyright: ignore[reportReturnType]

        seconds[width] = medians({"step": step}, 3 * args.rounds, 3)["step"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 768), ("width", 16384), ("batch", 2048), ("k", 32), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plot", type=Path, help="where to draw the cost in training by width")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    figures, scan = alone(args), in_training(args)
    if args.plot:
        points = {"measured": [(float(w), 1000 * s) for w, s in scan.items()]}
        points["in proportion to F"] = [(float(w), 1000 * scan[WIDTHS[0]] * w / WIDTHS[0]) for w in WIDTHS]
        figure = line_chart("C²R in training, milliseconds a step (lagged)", "latents F", points)
        svg = figure[figure.index("<svg") : figure.index("</svg>") + len("</svg>")]
        args.plot.write_text(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + "\n", encoding="utf-8")
    if args.json:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
        print(json.dumps({"settings": settings, "alone": figures, "in_training": scan}, ensure_ascii=False))
        return
    for name, value in figures.items():
        print(f"{name:<52}{value:12.4g}" + (" s" if "faster" not in name and "difference" not in name else ""))
    for width, seconds in scan.items():
        print(f"in training, F {width:<37}{1000 * seconds:12.1f} ms")


if __name__ == "__main__":
    main()
