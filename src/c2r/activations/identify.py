"""Identities of the text, tokenizer and model behind activations, and their comparison with what is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from c2r.config.run import ModelConfig, RunConfig
from c2r.config.text import DataConfig
from c2r.identity import ACTIVATIONS, differences, of_folder, of_tokenizer, versions
from c2r.language_model.model import LanguageModel, load_language_model, model_path
from c2r.text.sources import open_reader
from c2r.text.tokenizer import NoTokenizer

Identity = dict[str, Any]
"""Keys: `text` (by section of the configuration), `tokenizer`, `model` (configuration and weights), `activations`
(version of the code that computes them) and, only in caches, `files` (digests of the model's files). `code`, the
versions of libraries, is recorded but not compared."""


def identity_of(data: DataConfig, lm: LanguageModel, *, held_out: bool = False) -> Identity:
    """The identity of the activations of a loaded model on a text.

    Raises:
        ValueError: the text cannot be opened or read.
    """
    return {
        "text": {section: open_reader(section, part, held_out).identity() for section, part in data.sections.items()},
        **_of_model(lm),
        "activations": ACTIVATIONS,
        "code": versions(),
    }


def files_of(model: ModelConfig) -> dict[str, str]:
    """Digests of the model's files by name; empty if they are not on this machine.

    Raises:
        ValueError: a file cannot be read.
    """
    folder = _folder_of(model)
    try:
        return {} if folder is None else of_folder(folder)
    except OSError as error:
        raise ValueError(f"model.name: {error.filename} cannot be read: {error.strerror}") from error


def local_differences(recorded: Identity, config: RunConfig) -> list[str]:
    """Differences between a recorded identity and the text and model of a configuration, if these are on this machine.

    Files are compared by their contents; of data on the Hub, only the local cache. If the model's files differ, the
    model is loaded and compared, so that saving the same weights again makes no difference.

    Raises:
        ValueError: the model's files have changed, and it cannot be loaded.
    """
    assert isinstance(config.data, DataConfig)
    text = {}
    for section, source in config.data.sections.items():
        if source.source != "hf" or Path(source.path or "").exists():
            try:
                text[section] = open_reader(section, source).identity()
            except ValueError:  # the text may be absent
                continue
    known = {section: said for section, said in recorded["text"].items() if section in text}
    found: Identity = {"text": text, "activations": ACTIVATIONS}
    if _model_changed(recorded["files"], files_of(config.model), config.model):
        found |= _of_model(load_language_model(config.model))
    return differences({**recorded, "text": known}, found, "was", "is now")


def _of_model(lm: LanguageModel) -> Identity:
    parts = zip(("configuration", "weights"), lm.identity.split(":"), strict=True)
    tokenizer = None if isinstance(lm.tokenizer, NoTokenizer) else lm.tokenizer
    return {"tokenizer": of_tokenizer(tokenizer), "model": dict(parts)}


def _model_changed(recorded: dict[str, str], found: dict[str, str], model: ModelConfig) -> bool:
    """Whether a file of the model has changed or, for a local folder, was added."""
    whole = Path(model_path(model.name)).is_dir()  # the Hub's cache has only the files requested so far
    return any(recorded.get(name) != digest for name, digest in found.items() if whole or name in recorded)


def _folder_of(model: ModelConfig) -> Path | None:
    """Folder of the model's files on this machine; None if they are not here."""
    folder = Path(model_path(model.name))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
