"""A run's folder: the user's files are kept, other programs' folders are refused, c2r's own files are deleted."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders import known_run, run_config, same_run
from c2r.interop.saelens import load_sae, save_sae
from c2r.storage import MARK, record
from c2r.training import source
from c2r.training.checkpoint import list_checkpoints
from c2r.training.folder import held, patterns_of
from c2r.training.signals import Stopped
from c2r.training.trainer import train
from small_runs import changed, signalled


def theirs(folder: Path) -> list[str]:
    """Add a user's files to a run's folder; return their names."""
    names = [
        "notes.txt", "checkpoints/best.pt", "checkpoints/step_final/model.pt", "wandb/run-1-theirs/log.txt",
        "baseline/README.md", "evaluations/figure.png", "report.html",
    ]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    return names


def test_what_a_user_put_beside_a_run_outlives_it(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They survive resuming, the deletion of old checkpoints, and overwriting."""
    config = changed(known_run(tmp_path / "run"), checkpoint_every=2, keep_checkpoints=1)
    signalled(monkeypatch, {9: [signal.SIGINT], 20: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(config)
    names = theirs(config.output)
    (config.output / "wandb" / "id").write_text("0123abcd")
    (config.output / "wandb" / "offline-run-20260101_000000-0123abcd").mkdir()
    (config.output / "wandb" / "offline-run-20260101_000000-0123abcd" / "files").write_text("ours")
    with pytest.raises(Stopped):
        train(config)
    assert [path.name for path in list_checkpoints(config.output)] == ["step_00000021"]
    console = Console(record=True, width=300)
    train(known_run(tmp_path / "run"), overwrite=True, console=console)
    assert "kept, since c2r did not write them: baseline, checkpoints, evaluations, notes.txt" in (
        console.export_text()
    )
    for name in names:
        assert (config.output / name).read_text() == name
    assert list_checkpoints(config.output) == []
    assert os.listdir(config.output / "wandb") == ["run-1-theirs"]
    same_run(whole, config.output)


def test_a_name_that_the_run_needs_and_a_user_took_is_refused(tmp_path: Path) -> None:
    train(known_run(tmp_path / "run"))
    (tmp_path / "run" / "third").mkdir()
    (tmp_path / "run" / "third" / "thesis.tex").write_text("all my work")
    saes = [{"name": "third", "width": 24, "k": 2}]
    with pytest.raises(ValueError, match=r"contains files that c2r did not write \(third\)"):
        train(known_run(tmp_path / "run", saes=saes), overwrite=True)
    assert (tmp_path / "run" / "baseline" / "cfg.json").is_file()
    assert (tmp_path / "run" / "third" / "thesis.tex").is_file()


def test_another_programs_folder_is_refused_and_no_overwriting_is_suggested(tmp_path: Path) -> None:
    names = theirs(tmp_path / "run")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="contains files that c2r did not write") as refused:
            train(known_run(tmp_path / "run"), overwrite=overwrite)
        assert "overwrite" not in str(refused.value)
    found = [str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert sorted(found) == sorted(names)


def test_links_are_removed_and_not_what_they_lead_to(whole: Path, tmp_path: Path) -> None:
    output, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    train(changed(known_run(output), checkpoint_every=10))
    for name in ("checkpoints", "baseline"):
        (output / name).rename(disk / name)
        (output / name).symlink_to(disk / name)
    before = sorted(disk.rglob("*"))
    assert len(before) > 6
    train(known_run(output), overwrite=True)
    assert sorted(disk.rglob("*")) == before
    assert not (output / "baseline").is_symlink()
    assert not (output / "checkpoints").exists()
    same_run(whole, output)


def test_a_run_of_before_there_were_marks_is_adopted(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / MARK).unlink()
    (tmp_path / "run" / "thesis.tex").write_text("all my work")
    train(known_run(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").is_file()
    same_run(whole, tmp_path / "run")


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "load_language_model", None)
    opened = os.open

    def refused(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(MARK):
            raise OSError(30, "Read-only file system")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ValueError, match=r"output: cannot write in .*run: Read-only file system"):
        train(run_config(tmp_path / "run", tiny_models["llama"], corpus))


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        record(tmp_path / "run", "run", patterns_of(["baseline", "c2r"]), "output")
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    (tmp_path / "run" / "metrics.jsonl" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"output: cannot write .*metrics\.jsonl"):
        train(known_run(tmp_path / "run"), overwrite=True)


def test_checkpoints_are_in_the_order_of_their_steps_and_nothing_else_counts(tmp_path: Path) -> None:
    names = ["step_00000009", "step_99999999", "step_100000000"]
    for name in (*names, "step_00000010_backup", "step_best", "step_7"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000011").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == names


def test_an_sae_saved_into_a_users_folder_leaves_the_rest_of_it(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "thesis.tex").write_text("all my work")
    (tmp_path / "mine" / "README.md").write_text("about")
    (tmp_path / "mine" / "cfg.json").write_text("{}")
    save_sae(load_sae(whole / "baseline"), tmp_path / "mine", metadata={}, c2r={"x": 1})
    assert load_sae(tmp_path / "mine").config["c2r"] == {"x": 1}
    assert (tmp_path / "mine" / "deep" / "thesis.tex").read_text() == "all my work"
    assert (tmp_path / "mine" / "README.md").read_text() == "about"
    assert os.listdir(tmp_path) == ["mine"]
