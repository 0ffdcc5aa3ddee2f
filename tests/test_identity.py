"""Identities change exactly when the text, the tokenizer or the model changes."""

import gzip
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
import transformers
from tokenizers import normalizers, processors
from torch import nn

from builders import CONFIGS, tiny_tokenizer
from c2r import identity
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.identity import differences, of_files, of_folder, of_model, of_tensors, of_tokenizer
from c2r.language_model.model import load_language_model
from c2r.text import hub
from c2r.text.sources import StdlibReader, open_reader

# Weights


@pytest.mark.parametrize("change", ["rows", "signs", "cancelling", "transposed", "shape", "name", "dtype", "last bit"])
def test_tensors_with_the_same_sums_are_told_apart(change: str) -> None:
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    x[5] = -x[4]  # rows that cancel
    y, name = x.clone(), "w"
    if change == "rows":
        y = x[[1, 0, 2, 3, 4, 5]]
    elif change == "signs":
        y[4:] *= -1
    elif change == "cancelling":
        y[0, 0] += 0.5
        y[1, 1] -= 0.5
    elif change == "transposed":
        y = x.T
    elif change == "shape":
        y = x.reshape(4, 9)
    elif change == "dtype":
        y = x.view(torch.int64)
    elif change == "last bit":
        y.view(torch.int64)[3, 3] ^= 1
    else:
        name = "v"
    if change not in ("dtype", "last bit"):
        assert y.sum().item() == pytest.approx(x.sum().item(), abs=1e-12)
    assert of_tensors([(name, y)]) != of_tensors([("w", x)])


def test_layout_and_the_size_of_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(60.0).reshape(3, 4, 5).transpose(0, 2)
    whole = of_tensors([("w", x)])
    assert of_tensors([("w", x.contiguous())]) == whole
    for numbers in (1, 7, 20):
        monkeypatch.setattr(identity, "_NUMBERS", numbers)
        assert of_tensors([("w", x)]) == whole
    assert of_tensors([("s", torch.tensor(2.0))]) != of_tensors([("s", torch.tensor(-2.0))])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_does_not_matter() -> None:
    x = torch.randn(50, 3, dtype=torch.bfloat16)
    assert of_tensors([("w", x.cuda())]) == of_tensors([("w", x)])


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    for key, value in changes.items():
        setattr(config, key, value)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_a_model_is_its_configuration_and_its_weights() -> None:
    configuration, weights = of_model(tiny()).split(":")
    assert of_model(tiny(transformers_version="0.0.1", _name_or_path="/elsewhere")) == f"{configuration}:{weights}"
    assert of_model(tiny(rms_norm_eps=1e-2)).split(":")[1] == weights
    assert of_model(tiny(rms_norm_eps=1e-2)).split(":")[0] != configuration
    permuted = tiny()
    embedding = permuted.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(embedding[torch.arange(len(embedding)).flip(0)])
    assert of_model(permuted).split(":")[0] == configuration
    assert of_model(permuted).split(":")[1] != weights


def test_buffers_count_if_they_are_saved() -> None:
    found = {}
    for persistent in (True, False):
        for value in (1.0, 2.0):
            model = tiny()
            model.register_buffer("offset", torch.tensor([value]), persistent=persistent)
            found[persistent, value] = of_model(model)
    assert found[True, 1.0] != found[True, 2.0]
    assert found[False, 1.0] == found[False, 2.0] == of_model(tiny())


def test_tied_weights_count_once() -> None:
    model = tiny(tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    assert isinstance(model.lm_head, nn.Linear)
    assert "lm_head.weight" not in names
    assert of_model(model).split(":")[1] == of_tensors(model.named_parameters())


# Tokenizers


def changed_tokenizer(change: str) -> Any:
    tokenizer = tiny_tokenizer(bos_token="<|end|>", eos_token="<|end|>") if change == "pad" else tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    if change == "chat":
        tokenizer.chat_template = "{{ messages }}"
    elif change == "bos":
        backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    elif change == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif change == "added":
        tokenizer.add_tokens(["zebra"])
    elif change == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    elif change in ("merges", "vocabulary"):
        written = json.loads(backend.to_str())
        model = written["model"]
        if change == "merges":
            model["merges"][0], model["merges"][1] = model["merges"][1], model["merges"][0]
        else:
            model["vocab"]["a"], model["vocab"]["b"] = model["vocab"]["b"], model["vocab"]["a"]
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=type(backend).from_str(json.dumps(written)),
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>"),
        )
    return tokenizer


@pytest.mark.parametrize("change", ["chat", "bos", "normalizer", "added", "special", "pad", "merges", "vocabulary"])
def test_what_decides_ids_makes_another_tokenizer(change: str) -> None:
    assert of_tokenizer(changed_tokenizer(change)) != of_tokenizer(tiny_tokenizer())


def test_use_and_saving_do_not_change_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = of_tokenizer(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert of_tokenizer(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert of_tokenizer(loaded) == of_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path))


# Text


def write(folder: Path, **contents: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name.replace("_", ".") for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content)
    return paths


def test_files_are_their_contents_and_not_their_names(tmp_path: Path) -> None:
    first = of_files(write(tmp_path / "one", a_txt="ships", b_txt="sealing wax"))
    assert first.startswith("2 files of 16 bytes, ")
    assert of_files(write(tmp_path / "two", c_txt="ships", d_txt="sealing wax")) == first
    os.utime(tmp_path / "two" / "c.txt", (0, 0))
    assert of_files([tmp_path / "two" / "c.txt", tmp_path / "two" / "d.txt"]) == first
    others = [
        write(tmp_path / "order", a_txt="sealing wax", b_txt="ships"),
        write(tmp_path / "letter", a_txt="shops", b_txt="sealing wax"),
        write(tmp_path / "border", a_txt="shipss", b_txt="ealing wax"),
        write(tmp_path / "ending", a_txt="ships", b_jsonl="sealing wax"),
    ]
    assert len({first, *map(of_files, others)}) == 5
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read: No such file"):
        of_files([tmp_path / "gone.txt"])


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ships")
    first = of_files([path])
    path.write_text("shops")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert of_files([path]) != first


def test_of_very_large_files_pieces_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_WHOLE", 64)
    monkeypatch.setattr(identity, "_PIECE", 8)
    path = tmp_path / "a.txt"

    def found(data: bytes) -> str:
        path.write_bytes(data)
        identity._of_file.cache_clear()
        return of_files([path])

    data = bytes(range(200))
    pieces = 64 // 8
    seen = {place for i in range(pieces) for place in range(i * 192 // (pieces - 1), i * 192 // (pieces - 1) + 8)}
    assert {0, 199} <= seen
    assert len(seen) == 64
    before = found(data)
    for place in range(200):
        other = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        assert (found(other) != before) == (place in seen)
    assert found(data + b"x") != before
    monkeypatch.setattr(identity, "_WHOLE", 200)
    whole = found(data)
    assert all(found(data[:p] + b"!" + data[p + 1 :]) != whole for p in range(200) if data[p] != ord("!"))


def test_sources_are_what_they_hold(tmp_path: Path) -> None:
    def found(path: Path, **changes: Any) -> str:
        return open_reader("data", DataConfig(source="files", path=str(path), **changes)).identity()

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ships"}\n')
    first = found(path)
    assert found(tmp_path) == first
    path.write_text('{"text": "shops"}\n')
    assert found(path) != first
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "ships"}\n')
    assert found(tmp_path) not in (first, found(path))
    assert found(tmp_path, shuffle_documents=5) != found(tmp_path)


def test_the_standard_library_is_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert StdlibReader(True).identity() != StdlibReader(False).identity()
    from c2r.text import sources

    paths = write(tmp_path, a_py="one = 1", b_py="two = 2")
    monkeypatch.setattr(sources, "stdlib_part", lambda held_out: paths)
    before = StdlibReader(False).identity()
    paths[0].write_text("one = 7!")
    assert StdlibReader(False).identity() != before


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_local_data_sets_are_their_contents(
    saved: bool, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # pyright: ignore[reportAttributeAccessIssue, reportUnusedExpression]

    def identity_of(word: str, folder: str) -> str:
        path = tmp_path / folder
        if saved:
            datasets.Dataset.from_dict({"text": [word, "wax"]}).save_to_disk(str(path))
        else:
            write(path, train_jsonl=json.dumps({"text": word}) + '\n{"text": "wax"}\n')
        return open_reader("data", DataConfig(source="hf", path=str(path), streaming=streaming)).identity()

    first = identity_of("ships", "one")
    assert "split train" in first
    assert identity_of("ships", "two") == first
    assert identity_of("shops", "three") != first


def test_a_data_set_on_the_hub_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = ["0123abcd"]

    class Files(list[str]):
        origin_metadata = property(lambda self: [("user/set", commit[0])])

    class Builder:
        hash = "builder"

        class config:
            data_files: ClassVar = {"train": Files(["hf://datasets/set@x/a.parquet", "hf://datasets/set@x/b.parquet"])}

    monkeypatch.setattr(hub, "_origin_on_the_hub", hub._origin)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: Builder)
    reader = open_reader("data", DataConfig(source="hf", path="user/set", held_out=0))
    first = reader.identity()
    assert "2 files of user/set 0123abcd" in first
    assert reader.identity() == first
    commit[0] = "4567cdef"
    assert reader.identity() != first


# Folders of models, and the comparison


def test_a_models_files_are_read_and_stored_blobs_are_not(tmp_path: Path) -> None:
    write(tmp_path, config_json="{}", model_safetensors="weights", README_md="words")
    first = of_folder(tmp_path)
    assert list(first) == ["config.json", "model.safetensors"]
    write(tmp_path, model_safetensors="Weights")
    assert of_folder(tmp_path)["model.safetensors"] != first["model.safetensors"]
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_text("weights")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert of_folder(tmp_path)["model.safetensors"] == f"blob {'ab' * 32}"


def test_versions_are_facts_and_no_difference() -> None:
    before = {"text": {"data": "1"}, "model": {"weights": "a"}, "activations": 1, "code": {"torch": "1"}}
    assert differences(before, before | {"code": {"torch": "2"}, "files": {}}, "was", "is now") == []
    assert differences(before, before | {"activations": 2}, "was", "is now") == ["activations: was 1, is now 2"]
    after = before | {"text": {"data": "2", "more": "3"}, "model": {"weights": "b"}}
    assert differences(before, after, "was", "is now") == [
        "text.data: was 1, is now 2",
        "text.more: was none, is now 3",
        "model.weights: was a, is now b",
    ]


def test_versions_name_the_libraries_and_the_source() -> None:
    found = identity.versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert identity.source_digest().startswith(found["source"])


def test_a_loaded_model_has_the_identity_of_its_parts(tiny_models: dict[str, Path]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"])))
    assert lm.identity == of_model(lm.model)
