"""Make the language model that ships inside c2r: tokenizer, training, and the figures of its model card.

    python scripts/train_embedded.py --out src/c2r/assets/embedded        # about 35 minutes on 2 cores

A Llama of 2 layers, width 512, trained on the standard library's source (nineteen files of twenty) mixed with
lists that spell words, so that a word's first letter is computed at the word's own token. Everything is seeded;
another Python version or thread count gives another, equally good, model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from c2r.eval.absorption.probes import f1_per_class, one_vs_rest_probe
from c2r.text.spelling import PAIRS_PER_LIST, spelling_documents, vocabulary_words
from c2r.text.stdlib import stdlib_documents

VOCABULARY, WIDTH, LAYERS, HEADS, MLP = 8192, 512, 2, 8, 1024
CONTEXT, ROWS = 256, 16
END = "<|endoftext|>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training text, to which every word of it is added once more after a space.

    Code writes most words after a dot or an underscore; the addition makes whole words with their space merge.
    """
    documents = list(stdlib_documents(held_out=False))
    words = Counter(itertools.chain.from_iterable(re.findall(r"[A-Za-z]{2,}", text) for text in documents))
    spaced = (f" {word}" * count for word, count in sorted(words.items()) if count >= 3)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(documents, spaced), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def token_stream(tokenizer: Any, words: list[str], spelling: float, seed: int) -> Iterator[int]:
    """Tokens without end: passes over the text, spelling lists making up their share, documents parted by END."""
    lists = spelling_documents(words, seed)
    total, spelled = 0, 0
    for epoch in itertools.count():
        for text in stdlib_documents(seed + epoch, held_out=False):
            # Long files are cut, so that lists fall between their pieces.
            for piece in (text[i : i + 4000] for i in range(0, len(text), 4000)):
                documents = [tokenizer.encode(piece)]
                while spelled < spelling * (total + len(documents[0])):
                    documents.append(tokenizer.encode(next(lists)))
                    spelled += len(documents[-1])
                    total += len(documents[-1])
                total += len(documents[0])
                for ids in documents:
                    yield from ids
                    yield tokenizer.eos_token_id


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, constant, linear decay to nothing over the last half."""
    return min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)


def train(model: LlamaForCausalLM, stream: Iterator[int], steps: int, args: argparse.Namespace) -> None:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True),
    ]
    base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    began, recent = time.time(), []
    for step in range(steps):
        # (ROWS, CONTEXT), every row opened by END
        rows = torch.tensor([[0, *itertools.islice(stream, CONTEXT - 1)] for _ in range(ROWS)])
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, base, strict=True):
            group["lr"] = lr * learning_rate_factor(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=rows, labels=rows, output_hidden_states=True)
        # A small price on the residual's mean square keeps a few directions from growing without need.
        residual = torch.stack([h.float().pow(2).mean() for h in output.hidden_states[1:-1]]).mean()
        (output.loss + args.residual_price * residual).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(output.loss.item())
        if step % 100 == 99 or step == steps - 1:
            seconds = time.time() - began
            rate = (step + 1) * ROWS * CONTEXT / seconds
            loss = sum(recent[-100:]) / len(recent[-100:])
            print(
                f"step {step + 1}/{steps} loss {loss:.3f} residual {residual.item():.2f} {rate:.0f} tok/s", flush=True
            )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[float, float]:
    """Mean loss in nats on held-out code, and the entropy of its unigrams (what a model without context gets)."""
    tokens = [t for text in stdlib_documents(held_out=True) for t in [*tokenizer.encode(text), 0]]
    shares = torch.bincount(torch.tensor(tokens)).float() / len(tokens)
    entropy = -torch.xlogy(shares, shares).sum().item()
    rows = torch.tensor(tokens)[: 200 * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    rows = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], 1)
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(8)]
    return sum(losses) / len(losses), entropy


@torch.no_grad()
def word_activations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, words: list[str]
) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """Per hidden state `[W, D]` at each word's token in a list of pairs; its letter; how often the model says it."""
    lists = ["".join(f"\n {w} {w[0].upper()}" for w in words[i : i + PAIRS_PER_LIST]) for i in range(0, len(words), 40)]
    states: list[list[torch.Tensor]] = [[] for _ in range(LAYERS + 1)]
    said = []
    for text in lists:
        ids = torch.tensor([[0, *tokenizer.encode(text)]])
        at = torch.arange(2, ids.shape[1], 3)
        output = model(input_ids=ids, output_hidden_states=True)
        for found, hidden in zip(states, output.hidden_states, strict=True):
            found.append(hidden[0, at])
        said.append(output.logits[0, at].argmax(-1) == ids[0, at + 1])
    letters = torch.tensor([ord(word[0].lower()) - 97 for word in words])
    return [torch.cat(found) for found in states], letters, torch.cat(said).float().mean().item()


def letter_table(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> dict[str, object]:
    """The ground-truth probe of EVALS on held-out words, for the embedding and every layer's output."""
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    states, letters, accuracy = word_activations(model, tokenizer, [words[i] for i in order])
    cut = int(0.8 * len(words))
    rows = {}
    for name, x in zip(["embedding", *(f"layer {i}" for i in range(LAYERS))], states, strict=True):
        probe = one_vs_rest_probe(x[:cut], letters[:cut], 26)
        f1 = f1_per_class(probe, x[cut:], letters[cut:])
        argmax = (probe.logits(x[cut:]).argmax(-1) == letters[cut:]).float().mean().item()
        rows[name] = {"letters_over_0.6": int((f1 > 0.6).sum()), "mean_f1": f1.mean().item(), "argmax": argmax}
        rows[name]["f1"] = {chr(97 + i): round(v, 3) for i, v in enumerate(f1.tolist())}
    return {"letter_accuracy": accuracy, "words": len(words), "probe": rows}


@torch.no_grad()
def spectrum(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Norms at the first layer's output on held-out code, and how many directions carry the variance."""
    tokens = list(itertools.islice((t for d in stdlib_documents(held_out=True) for t in tokenizer.encode(d)), 20400))
    rows = torch.tensor(tokens).view(-1, CONTEXT - 1)
    x = model(input_ids=rows, output_hidden_states=True).hidden_states[1][:, 1:].reshape(-1, WIDTH)
    variances = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    shares = variances / variances.sum()
    norms = x.norm(dim=1)
    return {
        "median_norm": norms.median().item(),
        "max_norm": norms.max().item(),
        "mean_share_of_square": (x.mean(0).square().sum() / x.square().sum(1).mean()).item(),
        "variance_in_first_8": shares[:8].sum().item(),
        "effective_dimensions": math.exp(-torch.xlogy(shares, shares).sum().item()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--spelling", type=float, default=0.2, help="share of spelling lists in the tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--residual-price", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    words = vocabulary_words(tokenizer)
    print(f"{len(words)} words; letters {dict(sorted(Counter(w[0].lower() for w in words).items()))}", flush=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    train(model, token_stream(tokenizer, words, args.spelling, args.seed), args.tokens // (ROWS * CONTEXT), args)
    model.half().save_pretrained(args.out)  # what is measured is what ships, rounding included
    tokenizer.save_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    loss, entropy = held_out_loss(model, tokenizer)
    card: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.tokens,
        "held_out_loss": loss,
        "unigram_entropy": entropy,
        "spectrum": spectrum(model, tokenizer),
        **letter_table(model, tokenizer, words),
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "python": sys.version.split()[0],
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps({k: v for k, v in card.items() if k != "probe"}, indent=1))
    for name, row in card["probe"].items():
        print(name, row)


if __name__ == "__main__":
    main()
