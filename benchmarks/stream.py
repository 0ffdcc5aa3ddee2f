"""How fast activations come: a cache read shuffled beside read plainly, and live training beside its halves alone.

    python benchmarks/stream.py cache                 7.2 GB of bf16 activations are written to --folder first
    python benchmarks/stream.py live                  the embedded model and the demo's two SAEs (--width: another F)

Medians over rounds after warm-up, in one process.

cache: "plain" reads the shards in turn with safetensors and gives their rows as fp32 batches of unit mean square norm,
as training wants them; "shuffled" is the stream over the same files, checksums compared. "cold" has the system drop the
files from its page cache before every round (they then come from the disk), "warm" has them in memory. Each with one
thread for PyTorch and with all; the stream's own thread, which reads and compares, comes on top.

live: the rate of training from the stream, against the language model's half (tokenising, forward pass, norms) and the
SAEs' half (steps on batches at hand) alone, each with all threads and with one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from c2r.activations import cache
from c2r.activations.cache import CacheReader, read_shards, write_shard
from c2r.activations.reader import Part, live_reader
from c2r.activations.stream import ActivationStream
from c2r.config.hooks import HookPoint
from c2r.config.load import load_config
from c2r.config.run import ModelConfig, StreamConfig
from c2r.language_model.model import load_language_model
from c2r.memory import keep_freed_memory
from c2r.training.run import Run

POINT = HookPoint(12, "resid_post")


def write_cache(folder: Path, tokens: int, shard_tokens: int, d_in: int) -> None:
    """Shards of random activations."""
    with (folder / cache.SHARDS).open("w") as lines:
        for number in range(tokens // shard_tokens):
            x = torch.randn(shard_tokens, d_in, generator=torch.Generator().manual_seed(number)).bfloat16()
            ids, where = torch.zeros(shard_tokens, dtype=torch.int32), torch.zeros(shard_tokens, 2, dtype=torch.int32)
            part = Part({POINT: x}, {POINT: x.float().norm(dim=1)}, ids, where, None)
            lines.write(json.dumps(write_shard(folder, number, [part], None)) + "\n")


def drop(folder: Path) -> None:
    """Have the system forget the files' contents."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: Path, batch: int) -> int:
    done = 0
    for shard in read_shards(folder):
        x_nD = load_file(folder / cache.file_name(shard["number"], POINT.name))["x"]
        for first in range(0, len(x_nD), batch):
            done += len(x_nD[first : first + batch].float() / 48.0)
    return done


def bytes_alone(folder: Path) -> int:
    buffer = bytearray(2**22)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return sum(shard["tokens"] for shard in read_shards(folder))


def shuffled(folder: Path, batch: int, window: int, tokens: int) -> int:
    config = StreamConfig(window_tokens=window)
    stream = ActivationStream(CacheReader(folder, [POINT]), config, tokens=tokens)
    done = 0
    for x in stream.batches(batch, tokens):
        done += len(x.pop(POINT))  # dropped at once, as in `plain`
    stream.close()
    return done


def cache_states(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Whether files come from the disk, and threads that PyTorch has."""
    return [(state, threads) for state in ("warm", "cold") for threads in sorted({1, args.threads})]


def cache_rates(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Tokens a second, medians."""
    keep_freed_memory()
    write_cache(folder, args.tokens, args.shard_tokens, args.d_in)
    ways: dict[str, Callable[[], int]] = {
        "bytes read, nothing else": lambda: bytes_alone(folder),
        "plain sequential": lambda: plain(folder, args.batch),
        "shuffled": lambda: shuffled(folder, args.batch, args.window, args.tokens),
    }
    rates: dict[str, list[float]] = {}
    for state, threads in cache_states(args):
        torch.set_num_threads(threads)
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                if state == "cold":
                    drop(folder)
                began = time.perf_counter()
                done = way()
                seconds = time.perf_counter() - began
                assert done == args.tokens // args.shard_tokens * args.shard_tokens
                if number:
                    rates.setdefault(f"{state}, {threads} thread(s): {name}", []).append(done / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def live_rates(args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second, medians; the halves are measured before and after the joint run."""
    from importlib.resources import files

    keep_freed_memory()
    overrides = (f"stream.window_tokens={args.window}", "train.batch=2048", "train.tokens=100000000")
    config = load_config(Path(str(files("c2r") / "assets" / "demo.yaml")), overrides)
    lm = load_language_model(ModelConfig())
    reader = live_reader(config, lm)
    (point,) = config.points
    saes = config.saes[: args.saes]
    update = {"k_anneal": 0.0, "width": args.width}
    runs = [Run(sae.model_copy(update=update), config.train, lm.d_in) for sae in saes]
    rates: dict[str, list[float]] = {}

    def model_alone(parts: Iterator[Part]) -> int:
        return sum(len(next(parts)) for _ in range(max(1, args.window // 4096)))

    def saes_alone(batches: list[torch.Tensor]) -> int:
        for x in batches:
            for run in runs:
                run.step(x)
        return sum(map(len, batches))

    def timed(name: str, work: Callable[[], int]) -> None:
        began = time.perf_counter()
        done = work()
        rates.setdefault(name, []).append(done / (time.perf_counter() - began))

    class WithThreads:
        def read(self, start: Any = None) -> Iterator[Part]:
            torch.set_num_threads(args.model_threads)
            return reader.read(start)

    stream = ActivationStream(WithThreads(), config.stream)
    batches = stream.batches(2048, 10**8)
    pool = [next(batches)[point] for _ in range(args.window // 2048)]
    stream.close()
    parts = reader.read()
    next(parts)
    saes_alone(pool)

    def halves() -> None:
        for threads in (1, args.threads):
            torch.set_num_threads(threads)
            timed(f"language model alone, {threads} thread(s)", lambda: model_alone(parts))
            timed(f"SAEs alone, {threads} thread(s)", lambda: saes_alone(pool))

    torch.set_num_threads(args.threads)
    for _ in range(args.rounds // 2 + 1):
        halves()
    stream = ActivationStream(WithThreads(), config.stream)
    batches = stream.batches(2048, 10**8)
    torch.set_num_threads(args.threads)
    for number in range(args.rounds + 2):
        name = "live training" if number > 1 else "live training, warm-up"
        timed(name, lambda: saes_alone([x[point] for _ in pool if (x := next(batches))]))
    stream.close()
    torch.set_num_threads(args.threads)
    for _ in range(args.rounds // 2 + 1):
        halves()
    return {name: statistics.median(values) for name, values in rates.items() if "warm-up" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cache", "live"])
    parser.add_argument("--folder", type=Path, help="cache: where to write; a temporary folder if not given")
    for name, default in (
        ("tokens", 1_572_864), ("shard-tokens", 32_768), ("d-in", 2304), ("batch", 2048), ("window", 65_536),
        ("rounds", 5), ("threads", 2), ("model-threads", 2), ("saes", 2), ("width", 4096),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "cache":
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rates = cache_rates(args, Path(folder))
        names = [f"{state}, {threads} thread(s): " for state, threads in cache_states(args)]
        pairs = {f"{name}shuffled over plain": (f"{name}shuffled", f"{name}plain sequential") for name in names}
    else:
        rates = live_rates(args)
        pairs = {}
        for threads in (1, args.threads):
            halves = (f"{half} alone, {threads} thread(s)" for half in ("language model", "SAEs"))
            pairs[f"live over its slower half alone, {threads} thread(s)"] = (
                "live training",
                min(halves, key=lambda half: rates[half]),
            )
        both = [rates[f"{half} alone, {args.threads} thread(s)"] for half in ("language model", "SAEs")]
        rates["the halves one after the other"] = 1 / sum(1 / rate for rate in both)
        pairs["live over the halves one after the other"] = ("live training", "the halves one after the other")
    ratios = {name: rates[a] / rates[b] for name, (a, b) in pairs.items()}
    if args.json:
        settings = {name: value if isinstance(value, int) else str(value) for name, value in vars(args).items()}
        print(json.dumps({"settings": settings, "tokens_a_second": rates, "ratios": ratios}))
        return
    for name, rate in rates.items():
        size = f"{rate * args.d_in * 2 / 1e9:8.2f} GB/s" if args.what == "cache" else ""
        print(f"{name:<52}{rate:12,.0f} tokens/s {size}")
    for name, ratio in ratios.items():
        print(f"{name:<52}{ratio:12.2f}")


if __name__ == "__main__":
    main()
