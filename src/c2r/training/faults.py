"""What goes wrong in training: found early where it can be, told with what to do, its tensors kept to look at."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from c2r.config.known_features import SyntheticConfig
from c2r.config.run import RunConfig
from c2r.memory import RoomError, check_fits, in_gigabytes
from c2r.storage import cannot_write
from c2r.training.checkpoint import CHECKPOINTS, bytes_of
from c2r.training.run import Run

FAULTY = "faulty"
_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def check_loss(run: Run[Any], loss: Tensor, x_BD: Tensor, config: RunConfig) -> None:
    """Stop at a loss that is not finite, and keep the batch.

    Raises:
        ValueError: names the SAE, the step and the file.
    """
    if not torch.isfinite(loss):
        file = keep_faulty(config.output, run.step_number, {"x": x_BD})
        raise ValueError(
            f"saes.{run.config.name}: the loss is {loss.item()} at step {run.step_number}; a lower train.lr (now "
            f"{config.train.lr}) may help. The batch is in {file}"
        )


def check_weights(run: Run[Any]) -> None:
    """Refuse to keep a state that training cannot go on from.

    Raises:
        ValueError: weights or moments hold NaN or infinity; names the SAE and the step.
    """
    state = run.state_dict()
    for kind, tensors in (("weights", state["weights"]), *state["adam"].items()):
        for name, tensor in tensors.items():
            if not all(math.isfinite(bound) for bound in torch.stack(tensor.aminmax()).tolist()):
                raise ValueError(
                    f"saes.{run.config.name}: {kind}.{name} holds NaN or infinity after step {run.step_number}"
                )


def keep_faulty(output: Path, step: int, tensors: dict[str, Tensor]) -> str:
    """Save what could not be trained on as `faulty/step_….safetensors`; where it is, or why it is not."""
    path = output / FAULTY / f"step_{step:08d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        return cannot_write(path, bytes_of(tensors), error)
    return str(path)


def check_room(config: RunConfig, d_in: int, device: torch.device) -> None:
    """Refuse SAEs for which there is no memory.

    Raises:
        ValueError: what they need, what there is, and what to lower.
    """
    # fp32 encoder and decoder, each with its gradient and two moments; a step needs more than that.
    needed = sum(2 * sae.width * d_in * 4 * 4 for sae in config.saes)
    what = f"saes: weights, gradients and Adam's moments of {len(config.saes)} SAEs"
    check_fits(what, needed, device, "lower saes.*.width, or train fewer in a run")


def check_disk(config: RunConfig, runs: list[Run[Any]]) -> None:
    """Refuse a disk that cannot hold the checkpoints, the one being written too, and the SAEs.

    Raises:
        ValueError: what is needed, what is free, and what to do.
    """
    size, saes = (
        sum(bytes_of(run.state_dict()[key] if key else run.state_dict()) for run in runs) for key in ("", "weights")
    )
    kept = config.train.keep_checkpoints
    held = sum(path.stat().st_size for path in (config.output / CHECKPOINTS).rglob("*") if path.is_file())
    needed, free = (kept + 1) * size + saes - held, shutil.disk_usage(config.output).free
    if needed > free:
        raise ValueError(
            f"output: {config.output} needs another {in_gigabytes(needed)}, {kept} + 1 checkpoints of "
            f"{in_gigabytes(size)} and the SAEs, and the disk has {in_gigabytes(free)} free; free some, lower "
            f"train.keep_checkpoints (now {kept}), or give another folder"
        )


@contextlib.contextmanager
def telling_of_memory(config: RunConfig) -> Iterator[None]:
    """While entered, a device or machine that runs out of memory ends with what to lower.

    Raises:
        ValueError: in place of torch's and Python's own errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and not the only one
        said = str(error) or type(error).__name__
        if not isinstance(error, MemoryError) and not any(words in said for words in _NO_ROOM):
            raise
        lower = f"train.batch (now {config.train.batch}), saes.*.width, or the number of SAEs in a run"
        if not isinstance(config.data, SyntheticConfig):
            lower = (
                f"model.dtype (now {config.model.dtype}), stream.model_rows (now {config.stream.model_rows}), "
                f"data.context (now {config.data.context}), stream.window_tokens (now {config.stream.window_tokens}), "
                f"{lower}"
            )
        raise RoomError(f"out of memory: {said.splitlines()[0]}. Lower {lower}") from error
