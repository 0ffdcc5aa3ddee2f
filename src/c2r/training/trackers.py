"""Logging to Weights & Biases and TensorBoard in addition to metrics.jsonl; imported only if configured."""

from __future__ import annotations

import uuid
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from c2r.config.run import RunConfig
from c2r.layout import TENSORBOARD, WANDB
from c2r.storage import write_text


@runtime_checkable
class Tracker(Protocol):
    """An additional place to log a run's metrics to."""

    def log(self, sae: str, step: int, figures: dict[str, float]) -> None:
        """Log the metrics of one SAE in one step."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


def open_trackers(config: RunConfig, step: int) -> list[Tracker]:
    """Open the configured trackers for a run that has made `step` steps.

    Raises:
        ValueError: a tracker's package is not installed; names the extra.
    """
    trackers: list[Tracker] = []
    if config.tracking.tensorboard:
        trackers.append(TensorBoard(config.output, [sae.name for sae in config.saes], step))
    if config.tracking.wandb is not None:
        trackers.append(WeightsAndBiases(config))
    return trackers


def check_trackers(config: RunConfig) -> None:
    """Check before any long work that the packages of the configured trackers are installed.

    Raises:
        ValueError: a package is missing; names the field and the extra.
    """
    if config.tracking.tensorboard:
        _needed("torch.utils.tensorboard", "tensorboard")
    if config.tracking.wandb is not None:
        _needed("wandb", "wandb")


class TensorBoard:
    """Event files under `tensorboard/` in the output folder, one TensorBoard run per SAE."""

    def __init__(self, output: Path, saes: list[str], step: int) -> None:
        writer = _needed("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # Drop events from after the checkpoint: the resumed run writes them again.
        self.writers = {sae: writer(str(output / TENSORBOARD / sae), purge_step=step + 1) for sae in saes}

    def log(self, sae: str, step: int, figures: dict[str, float]) -> None:
        """Log the metrics of one SAE in one step."""
        for name, value in figures.items():
            self.writers[sae].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """One W&B run for all SAEs, with metrics named `<sae>/<metric>`; a resumed run continues it."""

    def __init__(self, config: RunConfig) -> None:
        asked = config.tracking.wandb
        assert asked is not None
        name = config.output / WANDB / "id"
        name.parent.mkdir(exist_ok=True)
        if not name.is_file():
            write_text(name, uuid.uuid4().hex[:12], "output")
        self.run = _needed("wandb", "wandb").init(
            project=asked.project, entity=asked.entity, name=asked.name or config.output.name, mode=asked.mode,
            dir=str(config.output), id=name.read_text(encoding="utf-8"), resume="allow",
            config=config.model_dump(mode="json", by_alias=True),
        )  # fmt: skip

    def log(self, sae: str, step: int, figures: dict[str, float]) -> None:
        """Log the metrics of one SAE in one step."""
        self.run.log({f"{sae}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Flush and close."""
        self.run.finish()


def _needed(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"tracking.{extra}: the package is not installed ({error}); pip install 'c2r[{extra}]', or remove the key"
        ) from error
