"""Checks for what can go wrong in training, with advice; tensors with NaN or infinity are saved for inspection.

B tokens in a batch · D width of the activations.
"""

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
from c2r.layout import CHECKPOINTS, FAULTY
from c2r.memory import RoomError, check_fits, in_gigabytes
from c2r.storage import cannot_write, whole
from c2r.training.checkpoint import bytes_of
from c2r.training.run import Run

_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def check_loss(run: Run[Any], loss: Tensor, x_BD: Tensor, config: RunConfig) -> None:
    """Stop if the loss is not finite, and save the batch.

    Raises:
        ValueError: the loss is NaN or infinite; names the SAE, the step and the saved file.
    """
    if not torch.isfinite(loss):
        file = keep_faulty(config.output, run.step_number, {"x": x_BD})
        raise ValueError(
            f"saes.{run.config.name}: the loss is {loss.item()} at step {run.step_number}; a lower train.lr "
            f"(currently {config.train.lr}) may help. The batch was saved: {file}"
        )


def check_weights(run: Run[Any]) -> None:
    """Refuse to save a state from which training could not resume.

    Raises:
        ValueError: weights or Adam's moments contain NaN or infinity; names the SAE, the tensor and the step.
    """
    state = run.state_dict()
    for kind, tensors in (("weights", state["weights"]), *state["adam"].items()):
        for name, tensor in tensors.items():
            if not all(math.isfinite(bound) for bound in torch.stack(tensor.aminmax()).tolist()):
                raise ValueError(
                    f"saes.{run.config.name}: {kind}.{name} contains NaN or infinity after step {run.step_number}"
                )


def keep_faulty(output: Path, step: int, tensors: dict[str, Tensor]) -> str:
    """Save tensors that cannot be trained on as `faulty/step_….safetensors`; return the path, or why saving failed."""
    path = output / FAULTY / f"step_{step:08d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        with whole(path) as partial:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    except (OSError, SafetensorError) as error:
        return cannot_write(path, bytes_of(tensors), error)
    return str(path)


def check_room(config: RunConfig, d_in: int, device: torch.device) -> None:
    """Refuse SAEs that do not fit into memory.

    Raises:
        ValueError: not enough memory; says what is needed, what is free, and what to lower.
    """
    # fp32 encoder and decoder, each with gradient and two moments. A lower bound: a step needs more.
    needed = sum(2 * sae.width * d_in * 4 * 4 for sae in config.saes)
    what = f"saes: weights, gradients and Adam's moments of {len(config.saes)} SAEs"
    check_fits(what, needed, device, "lower saes.*.width, or train fewer SAEs per run")


def check_disk(config: RunConfig, runs: list[Run[Any]]) -> None:
    """Refuse a disk without room for the checkpoints (kept ones plus the one being written) and the SAEs.

    Raises:
        ValueError: not enough space; says what is needed, what is free, and what to do.
    """
    size, saes = (
        sum(bytes_of(run.state_dict()[key] if key else run.state_dict()) for run in runs) for key in ("", "weights")
    )
    kept = config.train.keep_checkpoints
    held = sum(path.stat().st_size for path in (config.output / CHECKPOINTS).rglob("*") if path.is_file())
    needed, free = (kept + 1) * size + saes - held, shutil.disk_usage(config.output).free
    if needed > free:
        raise ValueError(
            f"output: {config.output} needs another {in_gigabytes(needed)} ({kept} + 1 checkpoints of "
            f"{in_gigabytes(size)} and the SAEs), but the disk has {in_gigabytes(free)} free; free some space, lower "
            f"train.keep_checkpoints (currently {kept}), or choose another folder"
        )


@contextlib.contextmanager
def telling_of_memory(config: RunConfig) -> Iterator[None]:
    """While entered, replace out-of-memory errors by one that says which settings to lower.

    Raises:
        RoomError: instead of torch's and Python's own errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of several RuntimeErrors
        said = str(error) or type(error).__name__
        if not isinstance(error, MemoryError) and not any(words in said for words in _NO_ROOM):
            raise
        lower = f"train.batch (currently {config.train.batch}), saes.*.width, or the number of SAEs in the run"
        if not isinstance(config.data, SyntheticConfig):
            lower = (
                f"model.dtype (currently {config.model.dtype}), "
                f"stream.model_rows (currently {config.stream.model_rows}), "
                f"data.context (currently {config.data.context}), "
                f"stream.window_tokens (currently {config.stream.window_tokens}), {lower}"
            )
        raise RoomError(f"out of memory: {said.splitlines()[0]}. Lower {lower}") from error
