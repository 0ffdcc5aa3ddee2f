"""Accepted model folders, and clear errors for ids, rows and text that a model cannot read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from builders import GATED, SHARED, run_config, tiny_tokenizer
from c2r.activations.reader import live_reader
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.suite import evaluate
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.text.packing import packed_rows
from c2r.text.tokenizer import NoTokenizer
from c2r.training.trainer import train

PLAIN = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama in the test's own folder."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "lm"))


def load(folder: Path | str, **rest: Any) -> LanguageModel:
    return load_language_model(ModelConfig(name=str(folder), **rest))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    weights = folder / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})


def remove_tokenizer(folder: Path) -> Path:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


# Weights


def test_weights_that_are_missing_are_named(folder: Path) -> None:
    rewrite(folder, lambda weights: {name: w for name, w in weights.items() if "layers.1.mlp" not in name})
    with pytest.raises(ValueError, match=r"lacks 3 of the weights of LlamaForCausalLM \(model\.layers\.1\.mlp\."):
        load(folder)


def test_a_base_models_weights_without_a_head_are_refused_unless_it_is_tied(tmp_path: Path) -> None:
    for tied in (True, False):
        config = transformers.LlamaConfig(**SHARED, **GATED, tie_word_embeddings=tied)
        place = tmp_path / str(tied)
        transformers.LlamaModel(config).save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    assert load(tmp_path / "True").d_in == 16
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of LlamaForCausalLM \(lm_head\.weight\)"):
        load(tmp_path / "False")


def test_weights_that_the_configuration_switches_off_are_refused_and_others_are_passed_over(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"model.layers.61.extra.weight": torch.ones(3)})
    assert load(folder).d_in == 16
    bias = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(16) for layer in range(3)}
    rewrite(folder, lambda weights: weights | bias)
    with pytest.raises(ValueError, match=r"its config\.json switches off \(model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(ValueError, match=r"lacks 9 of the weights"):  # k, v and o have none
        load(folder)


def test_an_adapter_is_refused_alone_and_beside_its_base(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    for place in (tmp_path / "alone", folder):
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
        with pytest.raises(ValueError, match=r"model\.name: .* holds an adapter .*made for 'a/b'.*merge_and_unload"):
            load(place)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model\.name: .*model\.gguf' is a file; accepted are .* a folder"):
        load(tmp_path / "model.gguf")


# Ids beyond the embeddings


def test_a_padding_token_beyond_the_embeddings_is_not_used(folder: Path) -> None:
    plain = load(folder).tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    lm = load(folder)
    assert lm.embeddings == 300
    path = str(write(folder / "a.jsonl", {"text": "The quick [PAD]brown"}))
    config = DataConfig(source="files", path=path, context=64, parse_special_tokens=True)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the token '\[PAD\]' has id 300, .* 300 rows; give the tok"):
        list(packed_rows(config, lm.tokenizer, embeddings=lm.embeddings))
    write(folder / "a.jsonl", {"text": "The quick brown"})
    (rows,) = packed_rows(config, lm.tokenizer, embeddings=lm.embeddings)
    (expected,) = packed_rows(config, plain)
    assert torch.equal(rows.ids, expected.ids)
    assert torch.equal(rows.real, expected.real)
    assert lm.activations(rows.ids).isfinite().all()


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_bos_and_eos_beyond_the_embeddings_are_refused_when_the_model_is_loaded(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model\.tokenizer: its eos_token '<\|new\|>' has id 300, .* 300 rows"):
        load(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_of_the_data_beyond_the_embeddings_are_named_with_their_place(folder: Path, workers: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    data = write(folder / "a.jsonl", {"ids": [4, 5]}, {"ids": [4, 300]}, {"ids": [6]})
    config = DataConfig(source="files", path=str(data), tokens_field="ids", context=16, workers=workers)
    run = run_config(folder / "run", folder, folder, data=config.model_dump())
    lm = load(folder)
    with pytest.raises(ValueError, match=r"tokens_field: .*a\.jsonl:2: the token '<new>' has id 300, .* 300 rows"):
        list(live_reader(run, lm).read())


def test_rows_that_come_another_way_are_checked_too(folder: Path) -> None:
    lm = load(folder)
    ids = torch.tensor([[4, 5, 6], [4, 5, 300]])
    for read in (lm.activations, lambda ids: lm.continuations(ids[:, :1], ids[:, 1:])):
        with pytest.raises(ValueError, match=r"in row 1, position 2 has id 300, but the model's embedding matrix has"):
            read(ids)
    with pytest.raises(ValueError, match=r"ids_RT: got rows of 65 tokens; the model reads at most 64"):
        lm.activations(torch.ones(1, 65, dtype=torch.long))


# Positions


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (lambda: transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64), 64),
        (lambda: transformers.LlamaConfig(**SHARED, **GATED), 64),
        (lambda: transformers.LlamaConfig(
            **SHARED, **GATED,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64
            },
        ), 256),
        (lambda: transformers.BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2), None),
        (lambda: transformers.FalconConfig(**PLAIN, alibi=True), None),
        (lambda: transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4), None),
        (lambda: transformers.RobertaConfig(
            **PLAIN, intermediate_size=24, max_position_embeddings=66, pad_token_id=1, is_decoder=True
        ), 64),
    ],
    ids=["gpt2", "llama", "yarn", "bloom", "falcon-alibi", "mamba", "roberta"],
)  # fmt: skip
def test_the_longest_row_that_a_model_reads(config: Callable[[], Any], positions: int | None) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config())
    lm = LanguageModel(model, None, layer=0, hook="resid_post")
    assert lm.positions == positions
    longest = torch.full((1, positions or 100), 5)
    assert lm.activations(longest).shape == (1, positions or 100, 16)
    if positions is not None:
        with pytest.raises(ValueError, match=rf"data\.context: got {positions + 1}; .* at most {positions} tokens"):
            lm.check_data(DataConfig(context=positions + 1))


def test_evaluation_refuses_longer_rows_as_training_does(
    tiny_run: dict[str, Path], tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    says = r"data\.context: got 128; .*llama reads at most 64 tokens"
    data = {"source": "files", "path": str(corpus), "context": 128}
    with pytest.raises(ValueError, match=says):
        train(run_config(tmp_path / "other", tiny_models["llama"], corpus, data=data))
    with pytest.raises(ValueError, match=says):
        evaluate([tiny_run["c2r"]], tmp_path / "out", suites=("core",), data=data)


# Models without tokenizer


def test_ids_are_read_as_they_are_without_a_tokenizer(folder: Path, tiny_models: dict[str, Path]) -> None:
    write(folder / "a.jsonl", {"ids": [5, 6, 0, 7]}, {"ids": [8, 9]})
    config = DataConfig(source="files", path=str(folder / "a.jsonl"), tokens_field="ids", context=8)
    lm = load(remove_tokenizer(folder))
    assert isinstance(lm.tokenizer, NoTokenizer)
    lm.check_data(config)
    (rows,) = packed_rows(config, lm.tokenizer, embeddings=lm.embeddings)
    assert rows.ids[0, :6].tolist() == [5, 6, 0, 7, 8, 9]
    assert rows.real[0].tolist() == [True, True, False, True, True, True, False, False]  # 0 is the model's BOS
    assert lm.tokenizer.decode([5, 6]) == "<5><6>"
    named = load(folder, tokenizer=str(tiny_models["llama"]))
    (usual,) = packed_rows(config, named.tokenizer)
    assert usual.ids[0, :8].tolist() == [0, 5, 6, 0, 7, 0, 8, 9]  # BOS first, EOS between


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # for GPT-2, transformers creates an empty tokenizer
def test_text_without_a_tokenizer_is_refused_with_the_key(
    family: str, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = remove_tokenizer(Path(shutil.copytree(tiny_models[family], tmp_path / "lm")))
    config = run_config(tmp_path / "run", folder, corpus)
    with pytest.raises(ValueError, match=r"model\.tokenizer: '.*lm' has no tokenizer, but text needs one; give"):
        train(config)
    model = {"name": str(folder), "layer": 1, "tokenizer": str(tiny_models["llama"])}
    train(run_config(tmp_path / "run", folder, corpus, model=model))
    saved = json.loads((tmp_path / "run" / "c2r" / "cfg.json").read_text())
    assert saved["c2r"]["model"]["tokenizer"] == str(tiny_models["llama"])


def test_a_tokenizer_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model\.tokenizer: .*empty'"):
        load(folder, tokenizer=str(tmp_path / "empty"))


def test_an_sae_of_ids_is_evaluated_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    remove_tokenizer(folder)
    rows = [{"ids": [(7 * i + 3 * j * j) % 290 + 5 for j in range(40)]} for i in range(60)]
    data = {"source": "files", "path": str(write(tmp_path / "a.jsonl", *rows)), "tokens_field": "ids", "context": 16}
    train(run_config(tmp_path / "run", folder, tmp_path, data=data))
    found = evaluate([tmp_path / "run" / "c2r"], tmp_path / "out", suites=("core",), tokens=500)
    assert found["c2r"]
