"""Caches and checkpoints record the content they were made from: changed content is refused."""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from builders import run_config, same_run
from c2r.activations import cache
from c2r.activations import harvest as fill
from c2r.activations.harvest import fill_cache
from c2r.config.run import RunConfig
from c2r.storage import held
from c2r.training.folder import as_written, differences
from c2r.training.run import Run
from c2r.training.signals import Stopped
from c2r.training.trainer import train
from small_runs import cached_run, files, signalled

QUIET = Console(quiet=True)


@pytest.fixture
def live(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> RunConfig:
    """A run with a copy of model and text that the test may change."""
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    shutil.copytree(corpus, tmp_path / "corpus")
    return run_config(tmp_path / "run", tmp_path / "model", tmp_path / "corpus")


@pytest.fixture
def cached(live: RunConfig, tmp_path: Path) -> RunConfig:
    """The same with a filled cache."""
    config = cached_run(tmp_path, tmp_path / "model", tmp_path / "corpus")
    fill_cache(config, console=QUIET)
    return config


def change(part: str, folder: Path) -> None:
    """Change the content of a part, keeping its name."""
    if part == "text":  # of the same size
        path = folder / "corpus" / "a.txt"
        path.write_text(path.read_text().replace("lazy", "hazy"))
    elif part == "model":  # swap two rows of one weight, which leaves sums unchanged
        weights = load_file(folder / "model" / "model.safetensors")
        name = "model.layers.0.mlp.down_proj.weight"
        weights[name] = weights[name].flip(0).contiguous()
        save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
        tokenizer.add_tokens(["fox"])
        tokenizer.save_pretrained(folder / "model")


SAYS = {"text": r"text\.data: was 2 files of", "model": r"model\.weights: was \w+,", "tokenizer": r"tokenizer: was"}


@pytest.mark.parametrize("part", list(SAYS))
def test_a_cache_of_other_contents_is_refused(part: str, cached: RunConfig, tmp_path: Path) -> None:
    assert cached.cache is not None
    before = files(cached.cache.path)
    change(part, tmp_path)
    for use in (train, fill_cache):
        with pytest.raises(ValueError, match=rf"(?s)acts was made from other data, .*{SAYS[part]} .* now "):
            use(cached, console=QUIET)
    assert files(cached.cache.path) == before
    assert not cached.output.exists()


def test_the_same_contents_serve_wherever_they_are(cached: RunConfig, tmp_path: Path) -> None:
    """The model saved again in shards, the text with other modification times, then both deleted."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    os.utime(tmp_path / "corpus" / "a.txt", (0, 0))
    assert cache.open_cache(cached)["complete"]
    fill_cache(cached, console=QUIET)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "corpus")
    train(cached, console=QUIET)


def test_a_cache_of_another_format_is_refused(cached: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    for use in (train, fill_cache):
        with pytest.raises(ValueError, match=r"acts has format 2, which does not record .* reads format 3"):
            use(cached, console=QUIET)


def test_a_manifest_of_something_else_is_not_called_a_damaged_cache(live: RunConfig, tmp_path: Path) -> None:
    """For example a web page's manifest: the message must not suggest deleting the folder."""
    config = cached_run(tmp_path, tmp_path / "model", tmp_path / "corpus")
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "manifest.json").write_text('{"name": "a page", "icons": []}')
    for use in (train, fill_cache):
        with pytest.raises(ValueError, match="holds something other than a cache") as refused:
            use(config, console=QUIET)
        assert "delete" not in str(refused.value)
    assert os.listdir(tmp_path / "acts") == ["manifest.json"]


@pytest.mark.parametrize("part", list(SAYS))
def test_a_live_run_does_not_resume_on_other_activations(
    part: str, live: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, {9: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(live, console=QUIET)
    before = {path: path.read_bytes() for path in live.output.rglob("*") if path.is_file()}
    original = {path: path.read_bytes() for path in tmp_path.glob("[mc]o*/*") if path.is_file()}
    change(part, tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)cannot resume from .*step_00000010: .*{SAYS[part]} .* now "):
        train(live, console=QUIET)
    assert {path: path.read_bytes() for path in live.output.rglob("*") if path.is_file()} == before
    for path in tmp_path.glob("[mc]o*/*"):
        path.write_bytes(original[path]) if path in original else path.unlink()
    train(live, console=QUIET)  # the restored content is accepted
    train(run_config(tmp_path / "whole", tmp_path / "model", tmp_path / "corpus"), console=QUIET)
    same_run(tmp_path / "whole", live.output)


def test_a_run_from_a_cache_does_not_resume_on_another_cache(
    cached: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cache.path` may change, since a cache can be moved, but its content may not."""
    signalled(monkeypatch, {9: [signal.SIGINT]})
    saes = [sae.model_copy(update={"name": name}) for name, sae in zip(("baseline", "c2r"), cached.saes, strict=True)]
    config = cached.model_copy(update={"saes": saes})
    with pytest.raises(Stopped):
        train(config, console=QUIET)
    change("text", tmp_path)
    assert config.cache is not None
    other = config.model_copy(update={"cache": config.cache.model_copy(update={"path": tmp_path / "other"})})
    fill_cache(other, console=QUIET)
    with pytest.raises(ValueError, match=r"(?s)cannot resume from .*text\.data: was 2 files of"):
        train(other, console=QUIET)
    config.cache.path.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "corpus")
    moved = config.model_copy(update={"cache": config.cache.model_copy(update={"path": tmp_path / "moved"})})
    train(moved, console=QUIET)


def test_a_run_resumes_where_its_text_and_model_were_moved_to(
    live: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, {9: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(live, console=QUIET)
    for name in ("model", "corpus"):
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    moved = run_config(tmp_path / "run", tmp_path / "moved_model", tmp_path / "moved_corpus")
    train(moved, console=QUIET)
    train(run_config(tmp_path / "whole", tmp_path / "moved_model", tmp_path / "moved_corpus"), console=QUIET)
    same_run(tmp_path / "whole", live.output)


def test_a_revision_that_is_named_later_makes_no_other_run(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", "some/model", tmp_path)
    named = config.model_copy(update={"model": config.model.model_copy(update={"revision": "0123"})})
    assert differences(as_written(config), named) == []
    assert differences(as_written(config), config.model_copy(update={"seed": 5})) != []


# Locks for writing and reading


def test_two_harvests_do_not_fill_one_cache(cached: RunConfig) -> None:
    """The second starts while the first writes its second shard."""
    assert cached.cache is not None
    whole, errors, original = files(cached.cache.path), list[str](), fill._add
    shutil.rmtree(cached.cache.path)

    def add(folder: Path, shards: list[Any], parts: Any, end: Any) -> None:
        if len(shards) == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        original(folder, shards, parts, end)

    def second() -> None:
        try:
            fill_cache(cached, console=QUIET)
        except ValueError as error:
            errors.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "_add", add)
        fill_cache(cached, console=QUIET)
    assert len(errors) == 1
    assert "another process is harvesting into" in errors[0]
    assert files(cached.cache.path) == whole


def test_a_cache_that_is_read_is_not_written(cached: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached.cache is not None
    before, original, seen = files(cached.cache.path), Run.step, []
    longer = cached.model_copy(update={"cache": cached.cache.model_copy(update={"tokens": 4000})})

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not seen:
            with pytest.raises(ValueError, match="another process is reading"):
                fill_cache(longer, console=QUIET)
            console = Console(record=True, width=200)
            fill_cache(cached, console=console)  # the cache is already complete
            seen.append(console.export_text())
        return original(self, x)

    monkeypatch.setattr(Run, "step", step)
    train(cached, console=QUIET)
    assert "nothing to do" in seen[0]
    assert files(cached.cache.path) == before
    with (
        held(cached.cache.path, "cache", "cache.path", "harvesting into"),
        pytest.raises(ValueError, match="another process is writing to"),
    ):
        train(cached.model_copy(update={"output": cached.output / "other"}), console=QUIET)


def test_a_cache_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    live: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached_run(tmp_path, tmp_path / "model", tmp_path / "corpus")
    monkeypatch.setattr(fill, "load_language_model", None)
    assert config.cache is not None
    config.cache.path.write_text("")
    with pytest.raises(ValueError, match=r"cache\.path: .*acts is not a folder"):
        fill_cache(config, console=QUIET)
    below = config.model_copy(update={"cache": config.cache.model_copy(update={"path": config.cache.path / "below"})})
    with pytest.raises(ValueError, match=r"cache\.path: cannot create the folder"):
        fill_cache(below, console=QUIET)
