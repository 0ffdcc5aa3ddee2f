"""SIGKILL at any moment, via the command line: restarting ends with the weights of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from builders import known_run, run_config, same_run, without_seconds
from c2r.cli import main
from c2r.config.run import RunConfig
from c2r.training.checkpoint import list_checkpoints
from c2r.training.folder import as_written
from c2r.training.trainer import train

ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def started(path: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "c2r.cli", "train", str(path)]
        return subprocess.Popen(command, env=ALONE, stdout=file, stderr=file)


def killed(process: subprocess.Popen[bytes], when: Callable[[], bool]) -> bool:
    """Kill the process as soon as a condition holds; False if it ended before."""
    end = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < end
        if when():
            process.kill()
            break
        time.sleep(0.0005)
    return process.wait() == -signal.SIGKILL


def saving(output: Path) -> bool:
    """Whether something is being written in the run's folder or its checkpoints."""
    return any(output.glob(".*.partial")) or any(output.glob("checkpoints/.*.partial"))


def written(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(as_written(config)))
    return path


def test_a_kill_while_saving(tmp_path: Path) -> None:
    section = {"tokens": 200 * 64, "batch": 64, "lr": 3e-3, "device": "cpu", "log_every": 7}
    config = known_run(tmp_path / "run", train=section | {"checkpoint_every": 2})
    path, output = written(config, tmp_path / "run.yaml"), config.output
    process = started(path, tmp_path / "log")
    assert killed(process, lambda: newest_step(output) > 2 and saving(output)), (tmp_path / "log").read_text()
    assert 2 < newest_step(output) < 200
    main(["train", str(path), "--set", "train.checkpoint_every=null"])
    train(known_run(tmp_path / "whole", train=section))
    same_run(tmp_path / "whole", output)
    assert without_seconds(output) == without_seconds(tmp_path / "whole")
    assert not saving(output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["known", "live", "cached"])
def test_many_kills(kind: str, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """At least 20 kills: some at random times after the start, some while saving, some while training."""
    steps = {"known": 3000, "live": 2400, "cached": 4500}[kind]  # too many to complete before the last kill
    section = {"tokens": steps * 64, "batch": 64, "lr": 1e-3, "device": "cpu", "checkpoint_every": 3}
    config = known_run(tmp_path / "run", train=section)
    if kind != "known":
        changes = {"train": section, "stream": {"window_tokens": 512, "model_rows": 8, "max_norm_multiple": 10}}
        config = run_config(tmp_path / "run", tiny_models["llama"], corpus, **changes)
    path, output, log = tmp_path / "run.yaml", config.output, tmp_path / "log"
    if kind == "cached":
        cached = as_written(config) | {
            "cache": {"path": str(tmp_path / "cache"), "tokens": 30_000, "shard_tokens": 4096}
        }
        path.write_text(yaml.safe_dump(cached))
        main(["harvest", str(path)])
        config = RunConfig.model_validate(cached)
    written(config, path)
    chance, kills, amid_saving, progress = random.Random(0), 0, 0, []
    while killed(started(path, log), a_moment(output, kills, chance) if kills < 24 else lambda: False):
        kills += 1
        amid_saving += saving(output)
        progress.append(newest_step(output))
    print(f"{kind}: {kills} kills, {amid_saving} amid saving, newest checkpoints {progress}")
    assert kills >= 20
    assert amid_saving >= 3
    assert progress == sorted(progress)
    train(config.model_copy(update={"output": tmp_path / "whole"}))
    same_run(tmp_path / "whole", output)
    assert without_seconds(output) == without_seconds(tmp_path / "whole")


def a_moment(output: Path, number: int, chance: random.Random) -> Callable[[], bool]:
    """Three kinds in turn: at a random time after the start, while saving, while training."""
    how, begun, before = ("anywhere", "saving", "training")[number % 3], time.monotonic(), newest_step(output)
    pause, advanced = chance.uniform(0, 8.0 if how == "anywhere" else 0.4), list[float]()

    def now() -> bool:
        if how == "anywhere":
            return time.monotonic() - begun > pause
        if not advanced and newest_step(output) == before:
            return False
        advanced.append(time.monotonic())
        return saving(output) if how == "saving" else time.monotonic() - advanced[0] > pause

    return now


def newest_step(output: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max((int(path.name.removeprefix("step_")) for path in list_checkpoints(output)), default=0)
