"""Text, packing, hook points and the stream: nothing is lost or repeated, and hooks emit the model's states."""

import json
import sysconfig
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers

from builders import CONFIGS, tiny_tokenizer, write_corpus
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.machine import pick_device
from c2r.text.packing import check_source, packed_rows
from c2r.text.spelling import spelling_documents, vocabulary_words
from c2r.text.stdlib import stdlib_documents

FAMILIES = list(CONFIGS)


# Text and packing


def test_stdlib_is_split_without_overlap() -> None:
    held, kept, whole = (Counter(stdlib_documents(0, held_out=h)) for h in (True, False, None))
    assert held + kept == whole
    assert 0.02 < sum(held.values()) / sum(whole.values()) < 0.08
    assert list(stdlib_documents(1, held_out=True)) != list(stdlib_documents(0, held_out=True))


@pytest.mark.parametrize("special", [{}, {"eos_token": "<|end|>"}, {"pad_token": "<|end|>"}])
@pytest.mark.parametrize("context", [5, 16])
def test_packing_keeps_every_token_once(special: dict[str, str], context: int, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(**special)
    lines = [f"document {i} says {'abc'[i % 3] * i}" for i in range(23)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    config = DataConfig(source="files", path=str(tmp_path / "d.jsonl"), context=context)
    parts = list(packed_rows(config, tokenizer, rows=3))
    ids, real = torch.cat([p.ids for p in parts]), torch.cat([p.real for p in parts])
    assert ids.shape[1] == context
    if tokenizer.bos_token_id is not None:
        assert (ids[:, 0] == tokenizer.bos_token_id).all()  # pyright: ignore[reportAttributeAccessIssue]
        assert not real[:, 0].any()
    expected = [token for line in lines for token in tokenizer.encode(line)]
    assert ids[real].tolist() == expected


def test_packing_marks_padding_and_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    config = DataConfig(source="files", path=str(tmp_path / "a.txt"), context=8)
    (part,) = packed_rows(config, tiny_tokenizer())
    assert part.ids[0, [0, -1]].tolist() == [0, 0]
    assert part.real.sum() == len(tiny_tokenizer().encode("abc"))


def test_epochs_repeat_the_text_in_another_order(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(name * 8)
    config = DataConfig(source="files", path=str(tmp_path), context=8)
    tokenizer = tiny_tokenizer()

    def tokens(epochs: int) -> list[int]:
        return [t for p in packed_rows(config, tokenizer, epochs=epochs) for t in p.ids[p.real].tolist()]

    once, twice = tokens(1), tokens(2)
    assert Counter(twice) == Counter(once + once)
    assert twice[: len(once)] == once
    assert twice[len(once) :] != once


def test_share_of_spelling_lists() -> None:
    tokenizer = load_language_model(ModelConfig()).tokenizer
    share = 0.3
    config = DataConfig(source="stdlib", spelling_fraction=share, context=128)
    rows = packed_rows(config, tokenizer, rows=400)
    text = tokenizer.decode(next(rows).ids.flatten())
    words = set(vocabulary_words(tokenizer))
    pairs = sum(
        len(parts := line.split()) == 2 and parts[0] in words and parts[1] == parts[0][0].upper()
        for line in text.split("\n")
    )
    assert pairs * 3 / len(tokenizer.encode(text)) == pytest.approx(0.8 * share, abs=0.08)


def test_words_are_single_tokens_and_spelt_right() -> None:
    tokenizer = load_language_model(ModelConfig()).tokenizer
    words = vocabulary_words(tokenizer)
    assert len(words) > 2000
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in words[::50])
    lists = spelling_documents(words, seed=0)
    seen = Counter()
    for _ in range(60):
        for line in next(lists).split("\n")[1:]:
            word, *rest = line.split()
            assert rest == [word[0].upper()] or rest[1:] == list(word.lower())
            seen[word] += 1
    assert max(seen.values()) == 1  # a word comes again only after all others


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", "not json\n", "x.jsonl:1 is not JSON"),
        ("x.jsonl", '{"body": "a"}\n', "no text under 'text'; its fields are: body"),
        ("x.txt", " \n", "holds no text"),
        ("x.jsonl", '{"text": ""}\n{"text": "  "}\n', "holds no text"),
        ("x.csv", "a,b", "accepted are .txt, .jsonl, .*parquet"),
    ],
)
def test_bad_files_are_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        check_source(DataConfig(source="files", path=str(tmp_path / name)))


def test_text_of_special_tokens_alone_does_not_go_on_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|end|>" * 50)
    config = DataConfig(source="files", path=str(tmp_path / "a.txt"), context=8, parse_special_tokens=True)
    with pytest.raises(ValueError, match="nothing to train on"):
        list(packed_rows(config, tiny_tokenizer(), epochs=None))


def test_evaluation_reads_other_files_and_lists_than_training() -> None:
    tokenizer = load_language_model(ModelConfig()).tokenizer
    config = DataConfig(source="stdlib", spelling_fraction=0.5, context=64)
    parts = [next(packed_rows(config, tokenizer, rows=300, held_out=h)) for h in (False, True)]
    trained, held_out = (set(map(tuple, part.ids[:, 1:].tolist())) for part in parts)
    assert not trained & held_out
    names = (files("c2r") / "assets" / "held_out.txt").read_text().split()
    assert len(names) == 36
    held = set(stdlib_documents(held_out=True))
    abc = Path(sysconfig.get_paths()["stdlib"], "abc.py").read_text()
    assert ("abc.py" in names) == (abc in held)


def test_missing_files_and_data_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: no file matches"):
        check_source(DataConfig(source="files", path=str(tmp_path / "none*.txt")))
    with pytest.raises(ValueError, match=r"data\.path: cannot open data set"):
        check_source(DataConfig(source="hf", path=str(tmp_path / "nowhere")))


def test_a_local_data_set(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "a.txt").unlink()
    config = DataConfig(source="hf", path=str(tmp_path), context=32)
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode([t for p in packed_rows(config, tokenizer) for t in p.ids[p.real].tolist()])
    assert text.count("is about") == 40
    with pytest.raises(ValueError, match=r"text_field.*'title'"):
        check_source(DataConfig(source="hf", path=str(tmp_path), text_field="title"))


# Hook points


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hooks_equal_the_models_hidden_states(family: str, layer: int, tiny_models: dict[str, Path]) -> None:
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    path = str(tiny_models[family])
    read = {
        hook: load_language_model(ModelConfig(name=path, layer=layer, hook=hook))
        for hook in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    }
    states = read["resid_pre"].model(ids, output_hidden_states=True).hidden_states
    acts = {hook: lm.activations(ids) for hook, lm in read.items()}
    torch.testing.assert_close(acts["resid_pre"], states[layer])
    if layer < 2:  # the last hidden state is taken after the final norm
        torch.testing.assert_close(acts["resid_post"], states[layer + 1])
    torch.testing.assert_close(
        acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"], acts["resid_post"], rtol=1e-4, atol=1e-4
    )
    assert all(lm.d_in == 16 for lm in read.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_replacing_at_a_hook_changes_the_logits(family: str, hook: str, tiny_models: dict[str, Path]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models[family]), layer=1, hook=hook))
    ids = torch.arange(1, 11).view(1, 10)
    clean = lm.logits(ids)
    torch.testing.assert_close(lm.logits(ids, lambda h: h), clean)
    assert (lm.logits(ids, torch.zeros_like) - clean).abs().max() > 1e-3
    torch.testing.assert_close(lm.logits(ids), clean)  # the hook is gone again


def test_the_forward_stops_at_the_hook(tiny_models: dict[str, Path]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    reached = []
    lm.model.model.layers[2].register_forward_hook(lambda *_: reached.append(2))
    lm.activations(torch.ones(1, 4, dtype=torch.long))
    assert reached == []
    lm.logits(torch.ones(1, 4, dtype=torch.long))
    assert reached == [2]


@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
@pytest.mark.parametrize(("layer", "hook"), [(0, "resid_pre"), (1, "resid_post")])
def test_continuations_are_the_end_of_whole_rows(
    family: str, layer: int, hook: str, tiny_models: dict[str, Path]
) -> None:
    if family == "mamba":  # keeps no keys and values: whole rows are read
        config = transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=3, state_size=4)
        lm = LanguageModel(transformers.MambaForCausalLM(config).eval(), None, layer=layer, hook=hook)
    else:
        lm = load_language_model(ModelConfig(name=str(tiny_models[family]), layer=layer, hook=hook))
    generator = torch.Generator().manual_seed(0)
    openings = torch.randint(1, 300, (2, 40), generator=generator)  # longer than Gemma 2's window of 32
    ids = torch.randint(1, 300, (6, 3), generator=generator)
    whole = lm.activations(torch.cat([openings.repeat_interleave(3, 0), ids], 1))
    torch.testing.assert_close(lm.continuations(openings, ids), whole[:, 40:], rtol=1e-4, atol=1e-5)


def test_wrong_layers_models_and_devices_are_named(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.layer: got 3; the model has 3 blocks, 0 to 2"):
        load_language_model(ModelConfig(name=str(tiny_models["gpt2"]), layer=3))
    with pytest.raises(ValueError, match=r"model\.name: cannot load"):
        load_language_model(ModelConfig(name=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"train\.device: got 'gpu'"):
        pick_device("gpu")
