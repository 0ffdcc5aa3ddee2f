"""The source of a run's activations: a language model, a cache, or synthetic known features."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from c2r.activations.cache import CacheReader, open_cache, read_manifest
from c2r.activations.identify import identity_of
from c2r.activations.reader import live_reader
from c2r.activations.stream import ActivationStream
from c2r.config.known_features import SyntheticConfig
from c2r.config.run import RunConfig
from c2r.config.saes import SAEConfig
from c2r.identity import ACTIVATIONS, versions
from c2r.known_features.presets import known_features
from c2r.known_features.stream import SyntheticStream
from c2r.language_model.model import load_language_model
from c2r.storage import read_held
from c2r.text.packing import Skipped, check_source, opens_with_bos
from c2r.text.tokenizer import NoTokenizer

Stream = ActivationStream | SyntheticStream


class Source(NamedTuple):
    """A stream of activations and its description for the SAE folders."""

    config: RunConfig
    stream: Stream
    d_in: int
    metadata: dict[str, Any]
    """SAELens's metadata about an SAE's origin, except the hook point."""
    identity: dict[str, Any]
    """Fingerprint of everything that determines the activations, by content."""
    skipped: Skipped = Skipped()
    """Records of the text that were skipped."""

    def model_of(self, sae: SAEConfig) -> dict[str, Any] | None:
        """The language model's section of the configuration with the SAE's own hook point; None without a model."""
        if isinstance(self.config.data, SyntheticConfig):
            return None
        return self.config.model.model_dump(mode="json") | self.config.point(sae)._asdict()

    def metadata_of(self, sae: SAEConfig) -> dict[str, Any]:
        """SAELens's metadata about this SAE's origin."""
        synthetic = isinstance(self.config.data, SyntheticConfig)
        return self.metadata | {"hook_name": None if synthetic else self.config.point(sae).name}


def check_data(config: RunConfig) -> None:
    """Check the data before a model is loaded.

    Raises:
        ValueError: missing files, a source without text, a preset with inconsistent parameters, or a cache that is
            missing, incomplete or made from other data.
    """
    if isinstance(config.data, SyntheticConfig):
        known_features(config.data)
    elif config.cache is not None:
        open_cache(config)
    else:
        check_source(config.data)


def cache_held(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Lock the run's cache, if any, against writing while entered; other runs may still read it."""
    return contextlib.nullcontext() if config.cache is None else read_held(config.cache.path, "cache.path")


def open_source(config: RunConfig, device: torch.device, console: Console) -> Source:
    """Open the configured activations.

    Raises:
        ValueError: the model, text, preset or cache cannot be used.
    """
    data = config.data
    if isinstance(data, SyntheticConfig):
        return _known_features(config, data, device, console)
    skipped = Skipped()
    if config.cache is None:
        lm = load_language_model(config.model, device)
        identity = identity_of(data, lm)
        reader, d_in, bos, where = live_reader(config, lm), lm.d_in, opens_with_bos(data, lm.tokenizer), "model"
        skipped = reader.skipped
        skipped.say = lambda message: console.print(f"[yellow]{escape(message)}[/]", soft_wrap=True)
        if isinstance(lm.tokenizer, NoTokenizer):
            console.print("[yellow]the model has no tokenizer: token ids are used unchanged, without BOS or EOS[/]")
    else:
        manifest = read_manifest(config.cache.path)
        assert manifest is not None  # checked by `check_data`
        identity = {part: said for part, said in manifest["identity"].items() if part != "files"}
        reader, where = CacheReader(config.cache.path, config.points, seed=config.seed), f"{config.cache.path}: model"
        d_in, bos = manifest["d_in"], manifest["prepend_bos"]
        if manifest["kept"] < config.train.tokens:
            console.print(
                f"[yellow]the cache has {manifest['kept']:,} tokens and train.tokens is {config.train.tokens:,}: "
                "it will be read repeatedly, each time in a different order[/]"
            )
    points = ", ".join(point.name for point in config.points)
    console.print(f"{where} {config.model.name}, {points}, width {d_in}; on {device}")
    metadata = {
        "model_name": config.model.name,
        "context_size": data.context,
        "prepend_bos": bos,
        "dataset_path": data.path or data.source,
    }
    stream = ActivationStream(
        reader, config.stream, tokens=config.train.tokens, seed=config.seed, device=device, decode=reader.decode
    )
    if config.model.center_writing_weights:
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    return Source(config, stream, d_in, metadata, identity, skipped)


def _known_features(config: RunConfig, data: SyntheticConfig, device: torch.device, console: Console) -> Source:
    features = known_features(data)
    console.print(
        f"preset {data.preset}, {features.features} known features, {features.mean_l0:.2f} active on average, "
        f"width {features.d_in}"
    )
    metadata = {"model_name": None, "dataset_path": f"synthetic:{data.preset}"}
    stream = SyntheticStream(features, seed=config.seed, device=device)
    return Source(config, stream, features.d_in, metadata, {"activations": ACTIVATIONS, "code": versions()})
