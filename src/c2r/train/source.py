"""Where a run's activations come from: a language model that reads text, or known features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rich.console import Console

from c2r.config import AnyData, DataConfig, RunConfig
from c2r.data.features import known_features
from c2r.data.harvest import LanguageModel, load_language_model
from c2r.data.stream import ActivationStream, SyntheticStream
from c2r.data.tokens import check_source, packed_rows
from c2r.interop.saelens import hook_name
from c2r.presets import SyntheticConfig

Stream = ActivationStream | SyntheticStream


class Source(NamedTuple):
    """A stream of activations and what an SAE's folder says of it."""

    stream: Stream
    d_in: int
    model: dict[str, Any] | None
    """The language model's section of the configuration; None without one."""
    metadata: dict[str, Any]
    """What SAELens keeps of an SAE's origin."""


def check_data(data: AnyData) -> None:
    """Find what is wrong with the data before a model is loaded.

    Raises:
        ValueError: missing files, a source without text, or a preset whose parameters do not fit together.
    """
    if isinstance(data, SyntheticConfig):
        known_features(data)
    else:
        check_source(data)


def open_source(config: RunConfig, device: torch.device, console: Console) -> Source:
    """The configured activations.

    Raises:
        ValueError: a model, text or preset that does not serve.
    """
    if isinstance(config.data, SyntheticConfig):
        return _known_features(config.data, config.seed, device, console)
    lm = load_language_model(config.model, device)
    check_context(config.data, config.model.name, lm)
    # Text is read as often as the configured tokens ask for, each pass in another order.
    rows = packed_rows(config.data, lm.tokenizer, seed=config.seed, rows=config.stream.rows, epochs=None)
    hook = hook_name(config.model.layer, config.model.hook)
    console.print(f"model {config.model.name}, {hook}, width {lm.d_in}")
    metadata = {
        "model_name": config.model.name,
        "hook_name": hook,
        "context_size": config.data.context,
        "prepend_bos": lm.tokenizer.bos_token_id is not None,
        "dataset_path": config.data.path or config.data.source,
    }
    stream = ActivationStream(lm, rows, config.stream, seed=config.seed, device=device)
    return Source(stream, lm.d_in, config.model.model_dump(mode="json"), metadata)


def _known_features(data: SyntheticConfig, seed: int, device: torch.device, console: Console) -> Source:
    features = known_features(data)
    console.print(
        f"preset {data.preset}, {features.features} known features, {features.mean_l0:.2f} on at once, "
        f"width {features.d_in}"
    )
    metadata = {"model_name": None, "hook_name": None, "dataset_path": f"synthetic:{data.preset}"}
    return Source(SyntheticStream(features, seed=seed, device=device), features.d_in, None, metadata)


def check_context(data: DataConfig, model: str, lm: LanguageModel) -> None:
    """Refuse rows longer than the model can read.

    Raises:
        ValueError: names the field and the limit.
    """
    positions = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.context > positions:
        raise ValueError(f"data.context: got {data.context}; {model} reads at most {positions} tokens")
