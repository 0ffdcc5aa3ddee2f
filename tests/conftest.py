"""Offline, one thread (threads fight on small machines), shapes of public functions checked as they run."""

import gc
import os
import shutil
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping

jaxtyping.install_import_hook("c2r", "typechecked.check")

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep their activations away from the user's."""
    os.environ["C2R_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time shape checks of tests, so that a wrong shape meets the library's own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def quick_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta-SAE of few steps, where its figure is not what is tested."""
    from c2r.eval.splitting import composition

    monkeypatch.setattr(composition, "_PASSES", 5)
    monkeypatch.setattr(composition, "_STEPS", 20)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of five families, made from configs and saved as any Hugging Face model is."""
    from builders import save_tiny_models

    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], corpus: Path) -> Path:
    """The folder of a run of seconds, for `tiny_run` to copy."""
    from builders import run_config
    from c2r.training.trainer import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(run_config(folder, tiny_models["llama"], corpus))
    return folder


@pytest.fixture
def tiny_run(trained: Path, tmp_path: Path) -> dict[str, Path]:
    """SAEs `baseline` and `c2r` on the tiny Llama, in a copy of their run's folder of the test's own: `run`."""
    shutil.copytree(trained, tmp_path / "run")
    return {name: tmp_path / "run" / name for name in ("baseline", "c2r")}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on known features that nothing has disturbed."""
    from builders import known_run
    from c2r.training.trainer import train

    folder = tmp_path_factory.mktemp("known") / "whole"
    train(known_run(folder))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from builders import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell's background jobs are told to ignore it.

    Nor may it arrive while the garbage collector runs: hypothesis has a callback there, in which it would be swallowed.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)
