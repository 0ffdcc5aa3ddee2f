"""Failures in long runs: full disks, NaN and infinity, sources that end, too little memory, pickles."""

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import c2r
from builders import known_run, run_config, same_run
from c2r import memory, storage
from c2r.activations import reader
from c2r.cli import main
from c2r.config.run import ModelConfig, RunConfig
from c2r.interop import saelens
from c2r.language_model.model import load_language_model
from c2r.sae.model import SAE
from c2r.training import checkpoint, faults
from c2r.training.checkpoint import CheckpointError, Checkpoints, list_checkpoints, read_checkpoint
from c2r.training.run import Run
from c2r.training.trainer import train


def every(config: RunConfig, steps: int, **section: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": steps, **section})})


def goes_on_as_if_nothing_had_been(config: RunConfig, whole: Path) -> None:
    """Restarting the run ends with the weights of an uninterrupted run."""
    train(config)
    same_run(whole, config.output)


# Disks


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit this process's files to `size` bytes, enforced by the operating system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_a_checkpoint_leaves_the_last_one_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = every(known_run(tmp_path / "run"), 5, log_every=20)
    original = Checkpoints.save

    def save(self: Checkpoints, step: int, state: dict[str, Any]) -> Path:
        with files_of_at_most(30_000 if step > 10 else 10**9):  # larger than an SAE's folder, smaller than a checkpoint
            return original(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000015 \([\d,]+ bytes; [\d,]+ free.*too large"):
        train(config)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000005", "step_00000010"}
    assert read_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state()["step"] == 10
    assert "cannot write" in c2r.load(tmp_path / "run" / "c2r").config["c2r"]["state"]["stopped"]
    monkeypatch.undo()
    goes_on_as_if_nothing_had_been(config, whole)


def test_a_full_disk_is_told_with_path_and_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def sync(path: Path) -> None:
        if "checkpoints" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    config = every(known_run(tmp_path / "run"), 5)
    for module, name, broken in ((checkpoint, "save_file", full), (storage, "sync", sync)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(CheckpointError, match=r"cannot write .*step_00000005 \([\d,]+ bytes.*No space left"):
                train(config, overwrite=True)
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    (tmp_path / "run.yaml").write_text((tmp_path / "run" / "run.yaml").read_text())
    monkeypatch.setattr(saelens, "save_file", full)
    with pytest.raises(SystemExit) as refused:
        main(["train", str(tmp_path / "run.yaml"), "--overwrite"])
    assert refused.value.code == 2
    assert f"cannot write {tmp_path / 'run' / 'baseline'} (" in capsys.readouterr().err
    monkeypatch.undo()
    goes_on_as_if_nothing_had_been(config, whole)


def test_metrics_that_cannot_be_written_end_the_run(whole: Path, tmp_path: Path) -> None:
    config = every(known_run(tmp_path / "run"), 5)
    with files_of_at_most(2000), pytest.raises(ValueError, match=r"cannot write .*metrics\.jsonl \(.*too large"):
        train(config)
    goes_on_as_if_nothing_had_been(config, whole)


def test_a_disk_too_small_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda path: usage._replace(free=130_000))
    with pytest.raises(
        ValueError, match=r"output: .* needs another .* \(2 \+ 1 checkpoints of .*; free some space, lower train"
    ):
        train(known_run(tmp_path / "run"))
    assert not (tmp_path / "run" / "run.yaml").exists()
    train(every(known_run(tmp_path / "run"), 10, keep_checkpoints=1))
    # Space used by existing checkpoints is not required again.
    held = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*.*"))
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda path: usage._replace(free=130_000 - held))
    shutil.rmtree(tmp_path / "run" / "c2r")
    train(every(known_run(tmp_path / "run"), 10, keep_checkpoints=1))


# NaN and infinity


def test_a_loss_that_is_no_number_keeps_its_batch_and_the_last_good_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = every(known_run(tmp_path / "run"), 4)
    original, given = Run.step, []

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step_number == 9 and self.config.name == "c2r":
            x = x.clone()
            x[3, 2] = float("inf")
            given.append(x)
        return original(self, x)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(ValueError, match=r"saes\.c2r: the loss is \S+ at step 10; .* The batch was saved: .*faulty"):
        train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000004", "step_00000008"]
    stored = load_file(tmp_path / "run" / "faulty" / "step_00000010.safetensors")["x"]
    assert torch.isfinite(stored).sum() in (stored.numel(), stored.numel() - 1)
    assert stored.shape == given[0].shape
    assert c2r.load(tmp_path / "run" / "baseline").config["c2r"]["state"]["tokens"] == 9 * 64
    assert not (tmp_path / "run" / "c2r").exists()
    monkeypatch.undo()
    goes_on_as_if_nothing_had_been(config, whole)


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = every(known_run(tmp_path / "run"), 4)
    original = Run.step

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        measured = original(self, x)
        if self.step_number == 8:
            self.optimizer.state[self.sae.b_enc]["exp_avg_sq"][5] = float("nan")
        return measured

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(ValueError, match=r"saes\.baseline: b_enc\.exp_avg_sq contains NaN or infinity after step 8"):
        train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000004"]


@pytest.fixture
def model_with_a_hole(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny model, with NaN as the embedding of #."""
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"])))
    (token,) = lm.tokenizer("#", add_special_tokens=False)["input_ids"]
    lm.model.get_input_embeddings().weight[token] = float("nan")
    lm.model.save_pretrained(tmp_path / "hole")
    lm.tokenizer.save_pretrained(tmp_path / "hole")
    return tmp_path / "hole"


def test_a_model_that_emits_nan_stops_the_run_with_the_part_kept(model_with_a_hole: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words in a row, and then " * 60 + "#" + " more of them" * 400)
    small = {"window_tokens": 256, "model_rows": 8, "max_norm_multiple": None}
    config = every(run_config(tmp_path / "run", model_with_a_hole, text, stream=small), 2)
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post are not finite .* \(at step (\d+); saved:") as e:
        train(config)
    step = int(str(e.value).split("(at step ")[1].split(";")[0])
    stored = load_file(tmp_path / "run" / "faulty" / f"step_{step:08d}.safetensors")
    assert not torch.isfinite(stored["blocks.1.hook_resid_post"]).all()
    assert step > 3
    newest = read_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state()
    assert newest["step"] == step - 1
    assert all(torch.isfinite(w).all() for w in newest["saes"]["c2r"]["weights"].values())
    assert c2r.load(tmp_path / "run" / "c2r").config["c2r"]["state"]["tokens"] == (step - 1) * 128


# Sources


def test_a_source_that_ends_early_is_told(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reader.packed_rows
    monkeypatch.setattr(reader, "packed_rows", lambda *a, **options: original(*a, **options | {"epochs": 1}))
    config = run_config(tmp_path / "run", tiny_models["llama"], corpus)
    config = every(config, 2, tokens=10**6)
    with pytest.raises(ValueError, match=r"data: the source ended after [\d,]+ of 1,000,000 tokens; add more"):
        train(config)
    state = c2r.load(tmp_path / "run" / "c2r").config["c2r"]["state"]
    assert "the source ended" in state["stopped"]
    assert state["tokens"] > 1000
    assert read_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state()["tokens"] == state["tokens"]


def test_a_source_that_breaks_once_is_gone_on_with(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reader.packed_rows

    def breaking(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, rows in enumerate(original(*arguments, **options)):
            if number == 12:
                raise ConnectionError("the line is dead")
            yield rows

    small = {"window_tokens": 256, "model_rows": 8, "max_norm_multiple": None}
    config = run_config(tmp_path / "run", tiny_models["llama"], corpus, stream=small)
    monkeypatch.setattr(reader, "packed_rows", breaking)
    with pytest.raises(ConnectionError, match="the line is dead"):
        train(config)
    tokens = c2r.load(tmp_path / "run" / "c2r").config["c2r"]["state"]["tokens"]
    assert 512 <= tokens < 2560
    monkeypatch.undo()
    train(config.model_copy(update={"output": tmp_path / "whole"}))
    goes_on_as_if_nothing_had_been(config, tmp_path / "whole")


# Memory


def test_a_model_too_big_is_refused_before_it_is_loaded(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    weights = load_file(tiny_models["llama"] / "model.safetensors")
    size = sum(weight.numel() for weight in weights.values()) * 4  # its embeddings are not tied
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(memory, "available_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=r"model\.name: the weights .* as float32 need .* cpu has .*; lower"):
        train(run_config(tmp_path / "run", tiny_models["llama"], corpus))
    monkeypatch.setattr(memory, "available_memory", lambda device: size)
    with pytest.raises(AssertionError, match="were read"):
        train(run_config(tmp_path / "run", tiny_models["llama"], corpus))


def test_free_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.available_memory(torch.device("cpu"))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free is not None
    assert 0 < free < total
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4500\n")
    (tmp_path / "memory.stat").write_text("anon 1800\nfile 2600\ninactive_file 2000\nactive_file 500\nslab 9\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory(torch.device("cpu")) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(torch.device("cpu")) == pytest.approx(free, rel=0.2)


def test_saes_too_big_are_refused(tmp_path: Path) -> None:
    saes = [{"name": "big", "width": 10**10, "k": 2}]
    with pytest.raises(ValueError, match=r"saes: .* of 1 SAEs need 7\.68e\+03 GB, but cpu has .*; lower saes"):
        train(known_run(tmp_path / "run", saes=saes))


@pytest.mark.parametrize("live", [False, True])
def test_memory_that_runs_out_amid_training_says_what_to_lower(
    live: bool,
    whole: Path,
    tiny_models: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Run.step

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step_number == 6:
            torch.empty(2**60)
        return original(self, x)

    monkeypatch.setattr(Run, "step", step)
    config = run_config(tmp_path / "run", tiny_models["llama"], corpus) if live else known_run(tmp_path / "run")
    says = r"out of memory: .*Lower "
    says += (
        r"model\.dtype \(currently float32\), stream\.model_rows \(currently 8\), data\.context"
        if live
        else r"train\.batch \(currently 64\)"
    )
    with pytest.raises(ValueError, match=says):
        train(config)
    assert c2r.load(config.output / "c2r").config["c2r"]["state"]["tokens"] == 6 * config.train.batch
    if not live:
        monkeypatch.undo()
        goes_on_as_if_nothing_had_been(config, whole)


def test_memory_that_runs_out_again_while_saving_keeps_the_other_saes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, export = Run.step, Run.export

    def out_of_memory(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step_number == 6 and self.config.name == "c2r":
            torch.empty(2**60)
        return step(self, x)

    def out_of_memory_again(self: Run[Any], scale: float = 1.0) -> SAE:
        assert self.sae.W_dec.grad is None
        if self.config.name == "baseline":
            torch.empty(2**60)
        return export(self, scale)

    monkeypatch.setattr(Run, "step", out_of_memory)
    monkeypatch.setattr(Run, "export", out_of_memory_again)
    config = known_run(tmp_path / "run")
    with pytest.raises(ValueError, match="out of memory"):
        train(config)
    assert not (config.output / "baseline").exists()
    assert "allocate memory" in c2r.load(config.output / "c2r").config["c2r"]["state"]["stopped"]


# Pickles


class Code:
    """Creates a folder when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_the_pickle_of_these_tests_runs_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_language_model_with_code_in_its_pickle_is_refused(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_language_model(ModelConfig(name=str(folder))).d_in == 16  # a pickle that contains only tensors is read
    torch.save(weights | {"more": Code(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.name: .*model' holds a pickle that contains code, which was not run"):
        train(run_config(tmp_path / "run", folder, corpus))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "ae.pt", "sae_weights.pkl"])
def test_an_sae_folder_with_a_pickle_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": 2, "d_sae": 4}))
    torch.save({"W_enc": torch.ones(2, 4), "more": Code(tmp_path / "ran")}, folder / name)
    with pytest.raises(ValueError, match=rf"{name} is a pickle, .*; c2r reads safetensors"):
        c2r.load(folder)
    (folder / name).write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(ValueError, match=rf"{name} is a pickle, .*; c2r reads safetensors"):
        c2r.load(folder)
    assert not (tmp_path / "ran").exists()
