"""The precision of an SAE's encoder product, and whether an int8 product finds batch-top-k's candidates."""

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
    """The precision in which one SAE trains."""

    product: torch.dtype
    """bfloat16 or float32, for the encoder's product and the lagged neighbour search."""
    int8: bool
    """Whether batch-top-k finds its candidates with an int8 product."""

    @property
    def record(self) -> dict[str, str]:
        """The same as values of `train.precision` and `train.selection`, which reproduce the choice on any machine."""
        return {
            "precision": str(self.product).removeprefix("torch."),
            "selection": "int8" if self.int8 else "product",
        }


def choose_precision(config: SAEConfig, train: TrainConfig, device: torch.device) -> Precision:
    """The precision that `train` asks for; where it says "auto", the choice of `c2r.machine`.

    Raises:
        ValueError: `train.selection` is "int8", which this device, processor or batch size does not allow.
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
    """Refuse `train.selection: int8` if it is not possible.

    Raises:
        ValueError: int8 selection is not possible; says why.
    """
    if train.selection != "int8":
        return
    obstacle = int8_obstacle(train, device)
    if obstacle is None and not coarse_works():
        features = ", ".join(cpu_features()) or "none known to c2r"
        obstacle = f"int8 products are not exact on this processor (instruction sets: {features})"
    if obstacle is not None:
        raise ValueError(f"train.selection: got 'int8', but {obstacle}; accepted here are 'auto' and 'product'")


def int8_obstacle(train: TrainConfig, device: torch.device) -> str | None:
    """Why the device or the batch size rules out int8, or None."""
    if device.type != "cpu":
        return f"it needs a CPU, and the device is {device.type!r}"
    if train.batch % GROUP:
        return f"it needs a train.batch that is a multiple of {GROUP}, and train.batch is {train.batch}"
    return None


def restored(state: dict[str, Any], device: torch.device) -> Precision:
    """The precision recorded in a checkpoint, without int8 if this machine cannot do it."""
    int8 = state["int8"] and device.type == "cpu" and coarse_works()
    return Precision(getattr(torch, state["product"]), int8)


def precision_lines(now: dict[str, Precision], began: dict[str, dict[str, Any]]) -> list[str]:
    """Console lines: one per distinct precision, and one if a resumed run cannot keep its int8 selection.

    Arguments:
        now: each SAE's precision, by name.
        began: when resuming, each SAE's checkpoint state, by name; otherwise empty.
    """
    saes: dict[str, list[str]] = {}
    for name, precision in now.items():
        text = f"encoder product in {precision.record['precision']}"
        saes.setdefault(text + ", int8 candidate search" * precision.int8, []).append(name)
    lines = [text if len(saes) == 1 else f"{text}: {', '.join(group)}" for text, group in saes.items()]
    lost = [name for name, state in began.items() if state["int8"] and not now[name].int8]
    if lost:
        lines.append(
            f"{', '.join(lost)}: training began with int8 candidate search, which this machine does not support. It "
            "continues without, so the weights will differ slightly from an uninterrupted run's"
        )
    return lines
