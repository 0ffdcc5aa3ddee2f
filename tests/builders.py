"""Small real things for tests: models made from configs, a tokenizer trained on a few lines, run configurations."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from c2r.config.evaluations import EvaluationConfig
from c2r.config.load import parse_config
from c2r.config.run import ModelConfig, RunConfig
from c2r.config.text import DataConfig
from c2r.eval.bench import Bench, Reading
from c2r.eval.disk_cache import Cache

ROOT = Path(__file__).parents[1]
"""The checkout."""
TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs, and then walk home slowly "
    "through the old town, where every street has a name that somebody once thought worth remembering.\n"
)
SHARED = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GATED = {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHARED, **GATED),
    "gemma2": lambda: transformers.Gemma2Config(**SHARED, **GATED, query_pre_attn_scalar=8, sliding_window=32),
    "qwen3": lambda: transformers.Qwen3Config(**SHARED, **GATED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHARED, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
}


def tiny_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries; `special` names bos, eos and pad tokens, <|end|> for each by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    named = special if special else dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def save_tiny_models(folder: Path) -> dict[str, Path]:
    """One folder a family."""
    transformers.utils.logging.disable_progress_bar()
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():  # initial weights are so small that blocks would do next to nothing
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    return {family: folder / family for family in CONFIGS}


def write_corpus(folder: Path, repeats: int = 40) -> Path:
    """A folder with one text file and one .jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text(TEXT * repeats)
    lines = [f'{{"text": "Line {i} is about {"abcdefghij"[i % 10] * 3}."}}' for i in range(repeats)]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_config(output: Path, language_model: Path | str, corpus: Path, **changes: Any) -> RunConfig:
    """A run of seconds: two SAEs of 32 latents; `changes` replace whole sections."""
    raw: dict[str, Any] = {
        "output": str(output),
        "model": {"name": str(language_model), "layer": 1},
        "data": {"source": "files", "path": str(corpus), "context": 16},
        "stream": {"window_tokens": 512, "model_rows": 8, "max_norm_multiple": None, "text_window_tokens": 1024},
        "train": {"tokens": 2560, "batch": 128, "lr": 1e-3, "precision": "float32", "device": "cpu"},
        "saes": [
            {"name": "baseline", "width": 32, "k": 4},
            {"name": "c2r", "width": 32, "k": 4, "c2r": {"strength": 0.9}},
        ],
    }
    if "stream" in changes:
        changes["stream"] = {"text_window_tokens": 1024} | changes["stream"]
    return parse_config(raw | changes, "test")


def known_run(output: Path, **changes: Any) -> RunConfig:
    """24 steps of two SAEs on known features, which need no language model; `changes` replace whole sections."""
    raw: dict[str, Any] = {
        "output": str(output),
        "data": {"source": "synthetic", "preset": "tree", "parents": 4, "children": 3, "independent": 8, "d_in": 24},
        "train": {"tokens": 1536, "batch": 64, "lr": 3e-3, "device": "cpu", "log_every": 1},
        "saes": [
            {"name": "baseline", "width": 24, "k": 2, "dead_after_tokens": 500},
            {"name": "c2r", "width": 24, "k": 2, "c2r": {"strength": 0.9, "ablation": "shuffled_norms"}},
        ],
    }
    return parse_config(raw | changes, "test")


def same_run(one: Path, other: Path) -> None:
    """Two runs' folders hold the same weights, bit for bit, from as many tokens."""
    for name in ("baseline", "c2r"):
        if (one / name).exists() or (other / name).exists():
            weights = [(folder / name / "sae_weights.safetensors").read_bytes() for folder in (one, other)]
            states = [json.loads((folder / name / "cfg.json").read_text())["c2r"]["state"] for folder in (one, other)]
            assert weights[0] == weights[1]
            assert states[0] == states[1]
            assert states[0]["stopped"] is None


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, all but the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def bench_of(
    lm: Any, model: ModelConfig, data: DataConfig, tokens: int, seed: int, cache: Path, **settings: Any
) -> Bench:
    """The context of evaluations on one language model, as `c2r.evaluate` makes it."""
    config = EvaluationConfig(tokens=tokens, seed=seed, **settings)
    console = Console(quiet=True)
    return Bench(config, Cache(cache), console, torch.device("cpu"), Reading(lm, model, data))
