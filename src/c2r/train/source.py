"""Where a run's activations come from: a language model that reads text, or known features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console

from c2r.config import AnyData, DataConfig, RunConfig
from c2r.data.features import known_features
from c2r.data.harvest import LanguageModel, load_language_model
from c2r.data.reader import LiveReader
from c2r.data.stream import ActivationStream, SyntheticStream
from c2r.data.tokens import Rows, check_source, packed_rows
from c2r.methods import SAEConfig
from c2r.presets import SyntheticConfig

Stream = ActivationStream | SyntheticStream


class Source(NamedTuple):
    """A stream of activations and what an SAE's folder says of it."""

    config: RunConfig
    stream: Stream
    d_in: int
    metadata: dict[str, Any]
    """What SAELens keeps of an SAE's origin, all but the hook point."""

    def model_of(self, sae: SAEConfig) -> dict[str, Any] | None:
        """The language model's section of the configuration with the SAE's own hook point; None without a model."""
        if isinstance(self.config.data, SyntheticConfig):
            return None
        return self.config.model.model_dump(mode="json") | self.config.point(sae)._asdict()

    def metadata_of(self, sae: SAEConfig) -> dict[str, Any]:
        """What SAELens keeps of this SAE's origin."""
        synthetic = isinstance(self.config.data, SyntheticConfig)
        return self.metadata | {"hook_name": None if synthetic else self.config.point(sae).name}


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
    data = config.data
    if isinstance(data, SyntheticConfig):
        return _known_features(config, data, device, console)
    lm = load_language_model(config.model, device)
    check_points(config, lm)
    check_context(data, config.model.name, lm)
    console.print(f"model {config.model.name}, {', '.join(point.name for point in config.points)}, width {lm.d_in}")
    metadata = {
        "model_name": config.model.name,
        "context_size": data.context,
        "prepend_bos": lm.tokenizer.bos_token_id is not None,
        "dataset_path": data.path or data.source,
    }

    def rows(start: Any) -> Iterator[Rows]:
        # Text is read as often as the configured tokens ask for, each pass in another order.
        return packed_rows(data, lm.tokenizer, seed=config.seed, rows=config.stream.rows, epochs=None, start=start)

    stream = ActivationStream(
        LiveReader(lm, config.points, rows), config.stream, tokens=config.train.tokens, seed=config.seed, device=device
    )
    return Source(config, stream, lm.d_in, metadata)


def _known_features(config: RunConfig, data: SyntheticConfig, device: torch.device, console: Console) -> Source:
    features = known_features(data)
    console.print(
        f"preset {data.preset}, {features.features} known features, {features.mean_l0:.2f} on at once, "
        f"width {features.d_in}"
    )
    metadata = {"model_name": None, "dataset_path": f"synthetic:{data.preset}"}
    return Source(config, SyntheticStream(features, seed=config.seed, device=device), features.d_in, metadata)


def check_points(config: RunConfig, lm: LanguageModel) -> None:
    """Refuse hook points that the model does not have.

    Raises:
        ValueError: names the SAE whose it is, and what the model has.
    """
    for sae in config.saes:
        try:
            lm.check_points([config.point(sae)])
        except ValueError as error:
            raise ValueError(f"saes.{sae.name}: {error}") from error


def check_context(data: DataConfig, model: str, lm: LanguageModel) -> None:
    """Refuse rows longer than the model can read.

    Raises:
        ValueError: names the field and the limit.
    """
    positions = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.context > positions:
        raise ValueError(f"data.context: got {data.context}; {model} reads at most {positions} tokens")
