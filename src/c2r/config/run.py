"""What a run's YAML may say: frozen, checked before any work, saved as the user wrote it.

Values that are found while running (scale, thresholds) live in the run's state and never here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from c2r.config.base import Frozen, Positive, Share, at_home
from c2r.config.hooks import Hook, HookPoint
from c2r.config.known_features import SyntheticConfig, of_preset
from c2r.config.saes import AnySAE, SAEConfig, TopKConfig
from c2r.config.text import DataConfig


class ModelConfig(Frozen):
    """The language model, and the place in it whose activations are learnt."""

    name: Annotated[str, BeforeValidator(at_home)] = "embedded"
    """`embedded`, a folder in Hugging Face format, or a Hub id."""
    layer: Annotated[int, Field(ge=0)] = 0
    """Block, counted from 0."""
    hook: Hook = "resid_post"
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; null: the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    center_writing_weights: bool = False
    """Activations as TransformerLens's option of that name leaves them: their mean over coordinates is subtracted. Of
    models with LayerNorm, whose output does not depend on that mean; models with RMSNorm are left as they are."""

    @property
    def point(self) -> HookPoint:
        """The hook point of SAEs that name none of their own."""
        return HookPoint(self.layer, self.hook)


def _of_its_source(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.get("source") == "synthetic":
        return of_preset(value)
    if value.get("source", "stdlib") not in ("stdlib", "files", "hf", "mixture"):
        raise ValueError(f"source: got {value['source']!r}; accepted are stdlib, files, hf, mixture, synthetic")
    return DataConfig.model_validate(value)


AnyData = Annotated[SerializeAsAny[DataConfig | SyntheticConfig], BeforeValidator(_of_its_source)]
"""What activations are made of: text that a language model reads, or, with source synthetic, known features."""


class StreamConfig(Frozen):
    """How activations are filtered, scaled and shuffled on their way to the SAEs."""

    window_tokens: Positive = 131_072
    """Activations of a window; the text is cut into windows and each is shuffled. One is held in memory."""
    prefetch_tokens: Positive | None = None
    """Activations that the language model may be ahead of the window; null: as many as a window has."""
    text_window_tokens: Annotated[int, Field(ge=0)] = 1_048_576
    """Tokens of a window of text, whose rows are shuffled before the model reads them; 0 leaves them in order."""
    max_norm_multiple: Annotated[float, Field(gt=1)] | None = 10.0
    """Tokens whose norm exceeds this many median norms are dropped; null keeps all."""
    model_rows: Positive = 32
    """Rows of `data.context` tokens a forward pass of the language model."""


class CacheConfig(Frozen):
    """Activations on disk: `c2r harvest` writes them, `c2r train` reads them in place of a language model."""

    path: Annotated[Path, BeforeValidator(at_home)]
    """Its folder."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """null: bfloat16 where the model is, else float32; so nothing is rounded."""
    tokens: Positive | None = None
    """Activations to keep; null: `train.tokens`. A cache that is shorter than that is read again in another order."""
    shard_tokens: Positive = 65_536
    """Activations of a file, roughly: it ends with a forward pass. One is held in memory while written."""


class TrainConfig(Frozen):
    """What all SAEs of a run share in training."""

    tokens: Positive
    """Activations each SAE sees, filtered ones not counted."""
    batch: Positive = 2048
    lr: Annotated[float, Field(gt=0)] = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Linear warm-up of the learning rate; null: 1000 (as published), a twentieth of the steps in a short run."""
    decay_from: Share = 0.8
    """Fraction of the steps from which the learning rate falls linearly to 0; 1 never."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the encoder's product and the lagged neighbour search; weights, gradients and optimiser are fp32 either way,
    and so are the activations of methods that select (the top-k family always, the others while less than 3 % of the
    activations fire). Where more fire, activations are the product's own, with bfloat16's rounding (2⁻⁹) if it is in
    bfloat16. auto follows a rule on the processor's features (`c2r.machine`): bfloat16 on a GPU that has it, and on a
    CPU with AMX or AVX-512's bf16. What was chosen is recorded in `cfg.json` (`c2r.machines`)."""
    selection: Literal["auto", "int8", "product"] = "auto"
    """How the batch-top-k methods find the candidates of a batch: among the values of the encoder's product, or by a
    product in int8 from whose candidates fp32 decides, which gives the set of an fp32 product. auto: int8 where
    `precision` is auto too and the rule on the processor's features says that it pays. Other methods ignore it."""
    device: str = "auto"
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; null: a minute, or what keeps writing them to a twentieth of the time."""
    keep_checkpoints: Positive = 2
    """The last so many are kept."""

    @property
    def steps(self) -> int:
        """Optimiser steps; the last batch may be short."""
        return -(-self.tokens // self.batch)


class WandbConfig(Frozen):
    """Weights & Biases."""

    project: str = "c2r"
    entity: str | None = None
    name: str | None = None
    """Null: the output folder's."""
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Frozen):
    """Where a run's figures go besides metrics.jsonl, which has them all."""

    tensorboard: bool = False
    """Event files under `tensorboard/` in the output folder; needs the extra of that name."""
    wandb: WandbConfig | None = None
    """Needs the extra of that name; `{}` takes the defaults."""


class RunConfig(Frozen):
    """A whole run: one stream of activations, any number of SAEs trained on it."""

    output: Annotated[Path, BeforeValidator(at_home)]
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: AnyData = DataConfig()
    stream: StreamConfig = StreamConfig()
    cache: CacheConfig | None = None
    """None (null): the language model runs while training."""
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()
    saes: Annotated[list[AnySAE], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        names = [sae.name for sae in self.saes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"saes: the names {twice} occur more than once; each SAE needs its own folder")
        unused = sorted({"cache", "model", "stream"} & self.model_fields_set)
        if unused and isinstance(self.data, SyntheticConfig):
            raise ValueError(f"{unused[0]}: given, but source 'synthetic' makes its activations without; leave it out")
        if not isinstance(self.data, SyntheticConfig) and self.stream.window_tokens < self.train.batch:
            raise ValueError(
                f"stream.window_tokens: got {self.stream.window_tokens}, less than train.batch {self.train.batch}"
            )
        for sae in self.saes:
            if isinstance(self.data, SyntheticConfig) and (sae.layer is not None or sae.hook is not None):
                raise ValueError(f"saes.{sae.name}: layer or hook given, but known features have none; leave it out")
            if (
                isinstance(sae, TopKConfig)
                and sae.threshold_start is not None
                and sae.threshold_start >= self.train.steps - 1
            ):
                raise ValueError(
                    f"saes.{sae.name}.threshold_start: got {sae.threshold_start}, but the run has "
                    f"{self.train.steps} steps; the inference threshold would never be learnt"
                )
        return self

    def point(self, sae: SAEConfig) -> HookPoint:
        """Where the activations that an SAE learns are read."""
        layer, hook = self.model.point
        return HookPoint(layer if sae.layer is None else sae.layer, hook if sae.hook is None else sae.hook)

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """All hook points of the run, each once, in the order of the SAEs."""
        return tuple(dict.fromkeys(map(self.point, self.saes)))
