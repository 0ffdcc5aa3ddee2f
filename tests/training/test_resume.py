"""Stopping and restarting runs: by signals, with changed settings, in folders with other content."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import c2r
from builders import known_run, run_config, same_run, without_seconds
from c2r.cli import main
from c2r.storage import MARK, record
from c2r.training import signals as stop
from c2r.training.checkpoint import list_checkpoints
from c2r.training.folder import as_written, differences, held, patterns_of
from c2r.training.run import Run
from c2r.training.signals import Stopped, StopSignals
from c2r.training.trainer import train
from small_runs import changed, signalled


@pytest.mark.parametrize("live", [False, True])
def test_a_run_stopped_by_signals_ends_as_an_undisturbed_one(
    live: bool,
    whole: Path,
    tiny_models: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(tmp_path / "parts", tiny_models["llama"], corpus) if live else known_run(tmp_path / "parts")
    if live:
        whole = tmp_path / "whole"
        train(run_config(whole, tiny_models["llama"], corpus))
    signalled(monkeypatch, {4: [signal.SIGINT], 11: [signal.SIGTERM], 12: [signal.SIGINT]})
    batch = config.train.batch
    for steps, name in ((5, "SIGINT"), (12, "SIGTERM"), (13, "SIGINT")):  # the current step is completed
        with pytest.raises(Stopped, match=name) as stopped:
            train(config)
        assert stopped.value.status == 128 + getattr(signal, name)
        assert [path.name for path in list_checkpoints(tmp_path / "parts")][-1] == f"step_{steps:08d}"
        state = c2r.load(tmp_path / "parts" / "c2r").config["c2r"]["state"]
        assert state["tokens"] == steps * batch
        assert state["stopped"] == f"Stopped: stopped by {name}"
    assert len(list_checkpoints(tmp_path / "parts")) == 2
    # Anything a killed process logged after its checkpoint is truncated.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"sae": "baseline", "step": 14, "tok')
    train(config)
    same_run(whole, tmp_path / "parts")
    assert without_seconds(tmp_path / "parts") == without_seconds(whole)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_left_alone(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("it trained")

    monkeypatch.setattr(Run, "step", step)
    console = Console(record=True, width=200)
    folders = train(known_run(tmp_path / "run"), console=console)
    assert folders == {name: tmp_path / "run" / name for name in ("baseline", "c2r")}
    assert "this run is complete" in console.export_text()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(AssertionError, match="it trained"):
        train(known_run(tmp_path / "run"), overwrite=True)


def test_the_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, {7: [signal.SIGTERM, signal.SIGTERM]})
    with pytest.raises(Stopped):
        train(changed(known_run(tmp_path / "run"), checkpoint_every=5))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000005"]
    assert not (tmp_path / "run" / "baseline").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_while_waiting_stop_at_once_and_ignored_ones_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            with signals.waiting():
                pass
    finally:
        signal.signal(signal.SIGINT, before)
    noticed: list[bytes] = []
    monkeypatch.setattr(stop.os, "write", lambda handle, text: noticed.append(text))
    reached: list[str] = []

    def signalled_while(waiting: bool) -> None:
        with StopSignals() as signals:
            if waiting:
                with signals.waiting():
                    os.kill(os.getpid(), signal.SIGINT)
                    reached.append("end of the wait")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end of the step")
            with signals.waiting():
                reached.append("next wait")

    for waiting, expected in ((True, []), (False, ["end of the step"])):
        with pytest.raises(Stopped):
            signalled_while(waiting)
        assert reached == expected
    assert len(noticed) == 1


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(train(known_run(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert set(found[0]) == {"baseline", "c2r"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_configuration_is_refused_with_the_difference(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = known_run(tmp_path / "run")
    signalled(monkeypatch, {4: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(config)
    first = config.saes[0].model_copy(update={"width": 32})
    other = changed(config, lr=0.1).model_copy(update={"saes": [first], "seed": 7})
    with pytest.raises(
        ValueError, match=r"the configuration has changed.*replace the run with `c2r train --overwrite"
    ) as refused:
        train(other)
    lines = {line.strip() for line in str(refused.value).splitlines()[1:]}
    assert "train.lr: was 0.003, is now 0.1" in lines
    assert "saes.0.width: was 24, is now 32" in lines
    assert 'saes.1.name: was "c2r", is now unset' in lines
    assert "seed: was 0, is now 7" in lines
    # run.yaml may have been edited; the configuration in the checkpoint decides.
    record = tmp_path / "run" / "run.yaml"
    record.write_text(record.read_text().replace("lr: 0.003", "lr: 0.1"))
    with pytest.raises(ValueError, match=r"train\.lr: was 0.003, is now 0.1"):
        train(changed(config, lr=0.1))
    record.write_text(record.read_text().replace("lr: 0.1", "lr: 0.003"))
    # Settings that do not affect the weights may change, and the change is recorded.
    train(changed(config, log_every=5, checkpoint_every=10, keep_checkpoints=1))
    assert "checkpoint_every: 10" in record.read_text()
    assert len(list_checkpoints(tmp_path / "run")) == 1
    same_run(whole, tmp_path / "run")


def test_defaults_that_are_written_out_are_no_difference(tmp_path: Path) -> None:
    config = known_run(tmp_path / "run")
    full = config.model_dump(mode="json", by_alias=True)
    written = {key: full[key] for key in ("output", "seed", "data", "train", "tracking", "saes")}
    assert written["saes"][0]["clip"] == 1.0
    assert differences(written, config) == []
    assert differences(as_written(config) | {"new_key": 1}, config) != []
    assert differences("text", config) != []


def test_overwrite_starts_afresh(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, {16: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(changed(known_run(tmp_path / "run"), lr=1e-4))
    train(known_run(tmp_path / "run"), overwrite=True)
    same_run(whole, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_what_kills_leave_behind_is_nobodys(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder):
        record(folder, "run", patterns_of(["baseline", "c2r"]), "output")
    for name in (".baseline.0123abcd.partial", ".c2r.89abcdef.old", "checkpoints/.step_00000001.0123abcd.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "tensors.safetensors").write_text("half")
    (folder / ".run.yaml.0123abcd.partial").write_text("half")
    with pytest.raises(
        ValueError, match=r"contains the remains of a deleted run; choose another folder, .* `c2r train --over"
    ):
        train(known_run(folder))  # checkpoints without a run.yaml: killed while an earlier run was being overwritten
    train(known_run(folder), overwrite=True)
    assert {path.name for path in folder.iterdir()} == {MARK, "run.yaml", "metrics.jsonl", "baseline", "c2r"}


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(ValueError, match="another process is training in"):
        train(known_run(tmp_path / "run"))
    train(known_run(tmp_path / "run"))


def test_a_damaged_checkpoint_is_skipped_when_asked(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(known_run(tmp_path / "run"), checkpoint_every=3)
    signalled(monkeypatch, {10: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(config)
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step_00000011"
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-100] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    with pytest.raises(SystemExit) as refused:
        main(["train", str(tmp_path / "run" / "run.yaml")])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert f"{newest / 'tensors.safetensors'} is corrupt" in said
    assert "step_00000009; resume from it with `c2r train --skip-damaged`" in said
    main(["train", str(tmp_path / "run" / "run.yaml"), "--skip-damaged"])
    same_run(whole, tmp_path / "run")


def test_a_run_that_goes_on_needs_its_first_weights_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(known_run(tmp_path / "first"))
    saes = [{"name": "c2r", "width": 24, "k": 2, "init": str(tmp_path / "first" / "baseline")}]
    train(known_run(tmp_path / "whole", saes=saes))
    signalled(monkeypatch, {9: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(known_run(tmp_path / "run", saes=saes))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    train(known_run(tmp_path / "run", saes=saes))
    same_run(tmp_path / "whole", tmp_path / "run")


def test_torchs_own_generator_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of c2r's methods uses it, but a user's own method may."""
    original = Run.step

    def step(self: Run[Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        return original(self, x + 0.01 * torch.randn(x.shape))

    monkeypatch.setattr(Run, "step", step)
    torch.manual_seed(5)
    train(known_run(tmp_path / "whole"))
    signalled(monkeypatch, {9: [signal.SIGINT]})
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        train(known_run(tmp_path / "run"))
    torch.manual_seed(6)
    train(known_run(tmp_path / "run"))
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_command_line_says_how_to_go_on_and_exits_as_signalled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(as_written(known_run(tmp_path / "run"))))
    signalled(monkeypatch, {4: [getattr(signal, name)]})
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path)])
    assert stopped.value.code == {"SIGINT": 130, "SIGTERM": 143}[name]
    said = capsys.readouterr().err.replace("\n", "")
    assert f"saved {tmp_path / 'run' / 'checkpoints' / 'step_00000005'}; run the same command again" in said
    assert f"c2r: stopped by {name}" in said
    main(["train", str(path)])
    assert "next: c2r eval" in capsys.readouterr().out
