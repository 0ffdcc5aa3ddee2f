"""c2r's training step, C²R on, beside those of sparsify and SAELens without it, as ratios in one run.

    python -m venv peers && peers/bin/pip install -c constraints.txt torch
    peers/bin/pip install -e . sae-lens==6.54.12 eai-sparsify==1.3.3
    peers/bin/python benchmarks/peers.py        or with  --json

Each library's own modules and loss, in fp32 as they run on a CPU, with the updates that their trainers make around
them; all with PyTorch's fused Adam, which is faster than what either trainer takes by default on a CPU. Medians over
interleaved rounds after warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sparsify import SparseCoder, SparseCoderConfig

from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS, ConsistencyConfig
from c2r.memory import keep_freed_memory
from c2r.training.run import Run
from step import activations, timed

Step = Callable[[torch.Tensor], object]


def of_sparsify(args: argparse.Namespace) -> Step:
    coder = SparseCoder(args.d_in, SparseCoderConfig(num_latents=args.width, k=args.k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3, fused=True)

    def step(x: torch.Tensor) -> None:
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step


def of_sae_lens(kind: type, config: type, args: argparse.Namespace) -> Step:
    sae = kind(config(d_in=args.d_in, d_sae=args.width, k=args.k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    none_dead = torch.zeros(args.width, dtype=torch.bool)

    def step(x: torch.Tensor) -> None:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=none_dead, n_training_steps=0, is_logging_step=False
        )
        sae.training_forward_pass(step_input=given).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(method: str, args: argparse.Namespace) -> Step:
    config = SECTIONS[method](name="x", width=args.width, k=args.k, k_anneal=0, c2r=ConsistencyConfig(strength=0.9))  # pyright: ignore[reportCallIssue]
    return Run(config, TrainConfig(tokens=10**9, batch=args.batch, lr=1e-3), args.d_in).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("width", 16384), ("batch", 2048), ("k", 32), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.default_allocator:
        keep_freed_memory()
    x = activations(args.batch, args.d_in)
    steps: dict[str, Step] = {
        "c2r BatchTopK with C²R": ours("batch_top_k", args),
        "c2r TopK with C²R": ours("top_k", args),
        "sparsify TopK": of_sparsify(args),
        "SAELens TopK": of_sae_lens(TopKTrainingSAE, TopKTrainingSAEConfig, args),
        "SAELens BatchTopK": of_sae_lens(BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, args),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 2):
        for name, step in steps.items():
            seconds = timed(lambda step=step: step(x))
            if number >= 2:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    first = median["c2r BatchTopK with C²R"]
    ratios = {f"{name} / c2r BatchTopK with C²R": value / first for name, value in median.items() if "c2r" not in name}
    if args.json:
        print(json.dumps({"settings": vars(args), "seconds": median, "ratios": ratios}, ensure_ascii=False))
        return
    for name, value in median.items():
        print(f"{name:<44}{1000 * value:9.1f} ms")
    for name, value in ratios.items():
        print(f"{name:<44}{value:9.2f}")


if __name__ == "__main__":
    main()
