"""Weights & Biases and TensorBoard, beside metrics.jsonl and with the same figures; imported only when asked for."""

from __future__ import annotations

import uuid
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from c2r.config.run import RunConfig


@runtime_checkable
class Tracker(Protocol):
    """Where a run's figures go besides its folder."""

    def log(self, sae: str, step: int, figures: dict[str, float]) -> None:
        """Take one SAE's figures of a step."""
        ...

    def close(self) -> None:
        """Write what is held back."""
        ...


def open_trackers(config: RunConfig, step: int) -> list[Tracker]:
    """The configured trackers, to go on after `step` steps.

    Raises:
        ValueError: one is asked for whose package is not installed; names the extra.
    """
    trackers: list[Tracker] = []
    if config.tracking.tensorboard:
        trackers.append(TensorBoard(config.output, [sae.name for sae in config.saes], step))
    if config.tracking.wandb is not None:
        trackers.append(WeightsAndBiases(config))
    return trackers


def check_trackers(config: RunConfig) -> None:
    """Find out that a tracker's package is missing before any long work.

    Raises:
        ValueError: names the field and the extra.
    """
    if config.tracking.tensorboard:
        _needed("torch.utils.tensorboard", "tensorboard")
    if config.tracking.wandb is not None:
        _needed("wandb", "wandb")


class TensorBoard:
    """Event files under `tensorboard/` in the run's folder, a run of TensorBoard's an SAE."""

    def __init__(self, output: Path, saes: list[str], step: int) -> None:
        writer = _needed("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # What was written after the checkpoint that the run goes on from will come again.
        self.writers = {sae: writer(str(output / "tensorboard" / sae), purge_step=step + 1) for sae in saes}

    def log(self, sae: str, step: int, figures: dict[str, float]) -> None:
        """Take one SAE's figures of a step."""
        for name, value in figures.items():
            self.writers[sae].add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is held back."""
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """One W&B run for all SAEs, each figure under `<sae>/<figure>`; a resumed run goes on in it."""

    def __init__(self, config: RunConfig) -> None:
        asked = config.tracking.wandb
        assert asked is not None
        name = config.output / "wandb" / "id"
        name.parent.mkdir(exist_ok=True)
        if not name.is_file():
            name.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self.run = _needed("wandb", "wandb").init(
            project=asked.project, entity=asked.entity, name=asked.name or config.output.name, mode=asked.mode,
            dir=str(config.output), id=name.read_text(encoding="utf-8"), resume="allow",
            config=config.model_dump(mode="json", by_alias=True),
        )  # fmt: skip

    def log(self, sae: str, step: int, figures: dict[str, float]) -> None:
        """Take one SAE's figures of a step."""
        self.run.log({f"{sae}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Write what is held back."""
        self.run.finish()


def _needed(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"tracking.{extra}: the package is not installed ({error}); pip install 'c2r[{extra}]', or leave it out"
        ) from error
