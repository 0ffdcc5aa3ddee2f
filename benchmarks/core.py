"""Core evaluation: time and memory, and how many times faster than whole passes with whole logits, in one run.

    python benchmarks/core.py                                       random Llama of SmolLM2-135M's shape, random tokens
    python benchmarks/core.py --model FOLDER --text FILE.jsonl      a real one

SAEs have random directions and one threshold that gives them an L0 of about 64. Whole passes are timed on the first
`--whole` tokens: every pass reads the whole model and makes all logits of its rows, with dense codes of the SAEs. The
result is JSON; CPU seconds say more than seconds on a machine that does other work, and memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.core import evaluate_core
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE, Extra
from c2r.text.packing import Rows, packed_rows


def random_llama(layer: int, dtype: str) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    return LanguageModel(model, None, layer=layer, hook="resid_post")


def rows_of(args: argparse.Namespace, lm: LanguageModel) -> list[Rows]:
    if args.text is not None:
        data = DataConfig(source="files", path=args.text, context=args.context)
        batches, found, seen = packed_rows(data, lm.tokenizer, rows=args.rows), [], 0
        for part in batches:
            found.append(part)
            seen += int(part.real.sum())
            if seen >= args.tokens:
                break
        return found
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 49152, (-(-args.tokens // args.context), args.context), generator=generator)
    return [Rows(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(args.rows)]


def random_sae(x_nD: Tensor, width: int, seed: int) -> SAE:
    """Tied random directions; the threshold lets about 64 latents fire per token."""
    W_FD = F.normalize(torch.randn(width, x_nD.shape[1], generator=torch.Generator().manual_seed(seed)))
    b_dec_D = x_nD.mean(0)
    pre_nF = (x_nD[:256] - b_dec_D) @ W_FD.T
    threshold = pre_nF.flatten().topk(64 * len(pre_nF)).values.min().clamp(min=0)
    extra = Extra(threshold=threshold.expand(width).clone())
    return SAE(W_FD, torch.zeros(width), W_FD.clone(), b_dec_D, architecture="jumprelu", extra=extra)


@torch.no_grad()
def whole_passes(lm: LanguageModel, saes: dict[str, SAE], rows: list[Rows]) -> dict[str, float]:
    """KL of each SAE, by whole logits of whole passes."""
    kl = dict.fromkeys(saes, 0.0)
    for part in rows:
        real, seen = part.real, []
        log_clean = lm.logits(part.ids, lambda h, seen=seen: seen.append(h) or h)[real].log_softmax(-1)
        x_nD = seen[0][real].float()
        lm.logits(part.ids, lambda h, real=real: h.masked_fill(real[..., None], 0))[real].log_softmax(-1)
        for name, sae in saes.items():
            x_hat_nD = sae.decode(sae.encode(x_nD))

            def splice(hidden: Tensor, real: Tensor = real, x_hat_nD: Tensor = x_hat_nD) -> Tensor:
                return hidden.index_put((real,), x_hat_nD.to(hidden.dtype))

            log_p = lm.logits(part.ids, splice)[real].log_softmax(-1)
            kl[name] += (log_clean.exp() * (log_clean - log_p)).sum().item()
    return {name: value / sum(int(part.real.sum()) for part in rows) for name, value in kl.items()}


def measured(work: Callable[[], Any], tokens: int) -> tuple[Any, dict[str, float]]:
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found, {
        "tokens": tokens, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "cpu_ms_per_token": round(1000 * cpu / tokens, 3), "peak_gib": round(peak, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 40_000), ("whole", 2048), ("saes", 4), ("width", 16384), ("layer", 5),
                          ("context", 128), ("rows", 16), ("threads", 2)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--model")
    parser.add_argument("--text")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        lm = random_llama(args.layer, args.dtype)
    else:
        lm = load_language_model(ModelConfig(name=args.model, layer=args.layer, dtype=args.dtype))
    rows = rows_of(args, lm)
    x_nD = lm.activations(rows[0].ids)[rows[0].real]
    saes = {f"sae{seed}": random_sae(x_nD, args.width, seed) for seed in range(args.saes)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tokens = sum(int(part.real.sum()) for part in rows)
    found, pieces = measured(lambda: evaluate_core(lm, saes, rows), tokens)
    few = rows[: max(1, args.whole // (args.rows * args.context))]
    whole_kl, whole = measured(lambda: whole_passes(lm, saes, few), sum(int(part.real.sum()) for part in few))
    few_found = evaluate_core(lm, saes, few)
    kl = {name: result.core["model_behavior_preservation"]["kl_div_with_sae"] for name, result in few_found.items()}
    print(json.dumps({
        "dtype": args.dtype, "threads": args.threads, "saes": args.saes, "width": args.width,
        "peak_gib_before": round(peak, 2), "pieces": pieces, "whole": whole,
        "whole_over_pieces_cpu": round(whole["cpu_ms_per_token"] / pieces["cpu_ms_per_token"], 2),
        "l0": {name: round(result.core["sparsity"]["l0"], 1) for name, result in found.items()},
        "kl_largest_relative_difference": max(abs(kl[name] / value - 1) for name, value in whole_kl.items()),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
