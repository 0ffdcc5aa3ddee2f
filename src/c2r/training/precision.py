"""In what precision an SAE's encoder product runs, and whether int8 finds batch-top-k's candidates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from c2r.config.run import TrainConfig
from c2r.config.saes import SAEConfig
from c2r.kernels.above import GROUP
from c2r.kernels.int8 import coarse_works
from c2r.machine import cpu_features, int8_pays, quick_dtype
from c2r.methods import METHODS, KeptPerBatch


class Precision(NamedTuple):
    """What one SAE trains in."""

    product: torch.dtype
    """bfloat16 or float32: the encoder's product, and the lagged neighbour search."""
    int8: bool
    """Whether batch-top-k finds its candidates by a product in int8."""

    @property
    def record(self) -> dict[str, str]:
        """As the configuration would say it: with these values for `train`, no choice is left to the machine."""
        return {
            "precision": str(self.product).removeprefix("torch."),
            "selection": "int8" if self.int8 else "product",
        }


def choose_precision(config: SAEConfig, train: TrainConfig, device: torch.device) -> Precision:
    """What `train` says, and the rule of `c2r.machine` where it says auto.

    Raises:
        ValueError: `train.selection` is int8, which this device, processor or batch size does not allow.
    """
    given = train.precision
    product = quick_dtype(device) if given == "auto" else getattr(torch, given)
    if METHODS[config.method].memory is not KeptPerBatch or train.selection == "product":
        return Precision(product, False)
    if train.selection == "int8":
        check_selection(train, device)
        return Precision(product, True)
    k: int = getattr(config, "k")  # noqa: B009  (all that select by batch have it)
    pays = given == "auto" and int8_obstacle(train, device) is None and int8_pays(cpu_features(), config.width, k)
    return Precision(product, pays and coarse_works())


def check_selection(train: TrainConfig, device: torch.device) -> None:
    """Refuse `train.selection: int8` where it cannot be had.

    Raises:
        ValueError: names what stands in the way.
    """
    if train.selection != "int8":
        return
    obstacle = int8_obstacle(train, device)
    if obstacle is None and not coarse_works():
        features = ", ".join(cpu_features()) or "none that c2r knows"
        obstacle = f"this processor's int8 products are not exact (its instruction sets: {features})"
    if obstacle is not None:
        raise ValueError(f"train.selection: got 'int8', but {obstacle}; accepted here are 'auto' and 'product'")


def int8_obstacle(train: TrainConfig, device: torch.device) -> str | None:
    """What of the device and the batch rules int8 out; None where nothing does."""
    if device.type != "cpu":
        return f"it needs a CPU and the device is {device.type!r}"
    if train.batch % GROUP:
        return f"it needs a train.batch that is a multiple of {GROUP} and train.batch is {train.batch}"
    return None


def restored(state: dict[str, Any], device: torch.device) -> Precision:
    """What the run began with, by its checkpoint, as far as this machine can continue it."""
    int8 = state["int8"] and device.type == "cpu" and coarse_works()
    return Precision(getattr(torch, state["product"]), int8)


def precision_lines(now: dict[str, Precision], began: dict[str, dict[str, Any]]) -> list[str]:
    """What to show of the SAEs' precisions: a line for each that differs, and one for what could not be continued.

    Arguments:
        now: what each SAE trains in, by name.
        began: on resuming, each one's checkpoint state.
    """
    saes: dict[str, list[str]] = {}
    for name, precision in now.items():
        text = f"encoder product in {precision.record['precision']}"
        saes.setdefault(text + ", candidates by int8" * precision.int8, []).append(name)
    lines = [text if len(saes) == 1 else f"{text}: {', '.join(group)}" for text, group in saes.items()]
    lost = [name for name, state in began.items() if state["int8"] and not now[name].int8]
    if lost:
        lines.append(
            f"{', '.join(lost)}: began with candidates by int8, which this machine does not have; from here on the "
            "product selects, so the weights will differ slightly from an uninterrupted run's"
        )
    return lines
