"""Offline, one thread (threads fight on small machines), shapes of public functions checked as they run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping

jaxtyping.install_import_hook(["c2r.penalty", "c2r.neighbors", "c2r.sae"], "beartype.beartype")

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


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of five families, made from configs and saved as any Hugging Face model is."""
    from helpers import save_tiny_models

    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on known features that nothing has disturbed."""
    from c2r.train.trainer import train
    from helpers import known_run

    folder = tmp_path_factory.mktemp("known") / "whole"
    train(known_run(folder))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))
