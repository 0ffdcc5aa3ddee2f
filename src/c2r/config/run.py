"""The configuration of a run, saved as the user wrote it.

Values found during training (activation scale, thresholds) are part of the run's state, not of the configuration.
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
    """The language model and the hook point whose activations the SAEs are trained on."""

    name: Annotated[str, BeforeValidator(at_home)] = "embedded"
    """The language model: `embedded` (a tiny model included in c2r), a folder in Hugging Face format, or a Hub id."""
    layer: Annotated[int, Field(ge=0)] = 0
    """Transformer block whose activations are read, counted from 0. Each SAE can override it."""
    hook: Hook = "resid_post"
    """Place in the block: the residual stream before (`resid_pre`) or after (`resid_post`) it, or the output of its MLP
    (`mlp_out`) or attention (`attn_out`). Each SAE can override it."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; null: the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the language model's weights and activations."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; null: the default branch."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may be executed."""
    center_writing_weights: bool = False
    """Whether to subtract each activation's mean over its coordinates, equivalent to TransformerLens's option of this
    name. Applies to models with LayerNorm, whose output does not depend on the mean; ignored for models with
    RMSNorm."""

    @property
    def point(self) -> HookPoint:
        """The hook point of SAEs that do not override it."""
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
"""The source of activations: text read by a language model, or known features if `source` is synthetic."""


class StreamConfig(Frozen):
    """How activations are filtered and shuffled before the SAEs are trained on them."""

    window_tokens: Positive = 131_072
    """Number of activations per shuffling window. Activations are shuffled within consecutive windows, one of which is
    held in memory."""
    prefetch_tokens: Positive | None = None
    """Number of activations that the language model may compute in advance, beyond the current window; null: the same
    as `window_tokens`."""
    text_window_tokens: Annotated[int, Field(ge=0)] = 1_048_576
    """Number of tokens per shuffling window of the text. Rows of tokens are shuffled within it before the language
    model reads them; 0: no shuffling."""
    max_norm_multiple: Annotated[float, Field(gt=1)] | None = 10.0
    """Activations whose norm exceeds this multiple of the median norm are dropped; null: none are."""
    model_rows: Positive = 32
    """Rows of `data.context` tokens per forward pass of the language model."""


class CacheConfig(Frozen):
    """Activations on disk: written by `c2r harvest`, read by `c2r train` instead of running the language model."""

    path: Annotated[Path, BeforeValidator(at_home)]
    """Folder of the cache."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type on disk; null: bfloat16 if `model.dtype` is, otherwise float32, so that nothing is rounded."""
    tokens: Positive | None = None
    """Number of activations to store; null: `train.tokens`. If training needs more than are stored, it reads the cache
    repeatedly, each time in a different order."""
    shard_tokens: Positive = 65_536
    """Approximate number of activations per file (rounded to whole forward passes). One file is held in memory while it
    is written."""


class TrainConfig(Frozen):
    """Training settings shared by all SAEs of a run."""

    tokens: Positive
    """Number of activations each SAE is trained on, not counting those dropped by `stream.max_norm_multiple`."""
    batch: Positive = 2048
    """Activations per batch (one optimisation step)."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of Adam."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps over which the learning rate rises linearly from 0; null: 1000 (as published), but at most a
    twentieth of the steps."""
    decay_from: Share = 0.8
    """Fraction of the steps after which the learning rate falls linearly to 0 at the last step; 1: no decay."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the encoder's matrix product and of the lagged neighbour search. Weights, gradients and optimiser
    are always fp32. Activations are recomputed in fp32 by the top-k methods, and by the other methods while less than
    3 % of activations are non-zero; otherwise they carry bfloat16's relative rounding error (2⁻⁹) if the product does.
    auto: bfloat16 on a GPU that supports it and on a CPU with AMX or AVX-512 bf16, otherwise float32 (see
    `c2r.machine`). The choice is recorded in `cfg.json` (`c2r.machines`)."""
    selection: Literal["auto", "int8", "product"] = "auto"
    """How the batch-top-k methods select a batch's largest activations. product: from the encoder's product. int8: an
    int8 product finds candidates, and fp32 decides among them, which selects the same set as an fp32 product. auto:
    int8 if `precision` is auto too and int8 is faster on this processor (see `c2r.machine`), otherwise product. Other
    methods ignore it."""
    device: str = "auto"
    """Torch device, such as `cpu` or `cuda:0`; auto: the GPU if there is one, otherwise the CPU."""
    log_every: Positive = 10
    """Number of steps between lines of metrics.jsonl."""
    checkpoint_every: Positive | None = None
    """Number of steps between checkpoints; null: one per minute, or less often if writing them would take more than 5 %
    of the time."""
    keep_checkpoints: Positive = 2
    """Number of most recent checkpoints to keep."""

    @property
    def steps(self) -> int:
        """Number of optimisation steps. The last batch may be smaller."""
        return -(-self.tokens // self.batch)


class WandbConfig(Frozen):
    """Logging to Weights & Biases."""

    project: str = "c2r"
    """Name of the W&B project."""
    entity: str | None = None
    """W&B user or team; null: your default entity."""
    name: str | None = None
    """Name of the W&B run; null: the name of the output folder."""
    mode: Literal["online", "offline"] = "online"
    """online: upload during the run. offline: write to disk only; upload later with `wandb sync`."""


class TrackingConfig(Frozen):
    """Where to log metrics in addition to metrics.jsonl, which always contains all of them."""

    tensorboard: bool = False
    """Whether to write event files to `tensorboard/` in the output folder; needs `pip install 'c2r[tensorboard]'`."""
    wandb: WandbConfig | None = None
    """Weights & Biases; null: off, `{}`: on with default settings. Needs `pip install 'c2r[wandb]'`."""


class RunConfig(Frozen):
    """A run: one stream of activations and any number of SAEs trained on it."""

    output: Annotated[Path, BeforeValidator(at_home)]
    """Folder for SAEs, metrics and checkpoints: new, empty, or of an earlier run with this configuration, which then
    resumes."""
    seed: int = 0
    """Random seed of the initialisation, of the order of the text and of shuffling."""
    model: ModelConfig = ModelConfig()
    """The language model."""
    data: AnyData = DataConfig()
    """The text, or synthetic activations with known features."""
    stream: StreamConfig = StreamConfig()
    """How activations are filtered and shuffled."""
    cache: CacheConfig | None = None
    """Cache of activations on disk; null: run the language model during training."""
    train: TrainConfig
    """Training settings shared by all SAEs."""
    tracking: TrackingConfig = TrackingConfig()
    """Logging to TensorBoard or Weights & Biases."""
    saes: Annotated[list[AnySAE], Field(min_length=1)]
    """The SAEs to train, at least one."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        names = [sae.name for sae in self.saes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"saes: the names {twice} occur more than once; each SAE needs its own folder")
        unused = sorted({"cache", "model", "stream"} & self.model_fields_set)
        if unused and isinstance(self.data, SyntheticConfig):
            raise ValueError(f"{unused[0]}: not used with source 'synthetic'; remove this section")
        if not isinstance(self.data, SyntheticConfig) and self.stream.window_tokens < self.train.batch:
            raise ValueError(
                f"stream.window_tokens: got {self.stream.window_tokens}; accepted is at least train.batch, "
                f"{self.train.batch}"
            )
        for sae in self.saes:
            if isinstance(self.data, SyntheticConfig) and (sae.layer is not None or sae.hook is not None):
                raise ValueError(f"saes.{sae.name}: layer and hook are not used with source 'synthetic'; remove them")
            if (
                isinstance(sae, TopKConfig)
                and sae.threshold_start is not None
                and sae.threshold_start >= self.train.steps - 1
            ):
                raise ValueError(
                    f"saes.{sae.name}.threshold_start: got {sae.threshold_start}, but the run has "
                    f"{self.train.steps} steps, so the inference threshold would never be learnt; accepted is below "
                    f"{self.train.steps - 1}"
                )
        return self

    def point(self, sae: SAEConfig) -> HookPoint:
        """The hook point that an SAE is trained on."""
        layer, hook = self.model.point
        return HookPoint(layer if sae.layer is None else sae.layer, hook if sae.hook is None else sae.hook)

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """The distinct hook points of the run, in the order of the SAEs."""
        return tuple(dict.fromkeys(map(self.point, self.saes)))
