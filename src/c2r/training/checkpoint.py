"""Checkpoints: all that a run needs to go on bit for bit, written so that a kill at any moment leaves none half there.

    output/checkpoints/step_00001234/tensors.safetensors    the state's tensors
    output/checkpoints/step_00001234/state.json             the rest of it, and checksums of both

A state is a tree: dicts and lists of JSON values and tensors. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r.config.run import TrainConfig
from c2r.storage import cannot_write, discard, hidden, sync

CHECKPOINTS, TENSORS, STATE = "checkpoints", "tensors.safetensors", "state.json"
FORMAT = 4
_STEP = re.compile(r"step_(\d{8,})")
_SECONDS, _SHARE = 60.0, 0.05
_MARK = "__tensor__"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is damaged."""


class Checkpoint(NamedTuple):
    """A checkpoint that is whole."""

    folder: Path
    tree: dict[str, Any]
    """The state with names in the place of tensors."""

    def state(self) -> dict[str, Any]:
        """The state; tensors are mapped from the file, and so cost little memory until they are copied."""
        return _with_tensors(self.tree, load_file(self.folder / TENSORS))


class Checkpoints:
    """The checkpoints of a run in `output`: when one is due, and how it is written.

    With `train.checkpoint_every` unset one is due a minute after the last, or after 20 times what the last took to
    write where that is more: a kill costs about a minute, and writing at most a twentieth of the time.
    """

    def __init__(self, output: Path, train: TrainConfig) -> None:
        self.output, self.every, self.keep = output, train.checkpoint_every, train.keep_checkpoints
        self.saved, self.cost = time.monotonic(), 0.0

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be kept."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.saved >= max(_SECONDS, self.cost / _SHARE)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after `step` steps, and let go of all but the last `keep_checkpoints`.

        Raises:
            CheckpointError: it cannot be written; the earlier ones are untouched.
        """
        began = time.monotonic()
        folder = self.output / CHECKPOINTS / f"step_{step:08d}"
        write_checkpoint(folder, state)
        for old in list_checkpoints(self.output)[: -self.keep]:
            discard(old)
        self.saved = time.monotonic()
        self.cost = self.saved - began
        return folder


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; whether they are whole is not looked at.

    Anything else in `checkpoints/` is the user's and passed over.
    """
    found = ((_STEP.fullmatch(path.name), path) for path in (output / CHECKPOINTS).glob("step_*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name and path.is_dir())]


def latest_checkpoint(output: Path, *, skip_damaged: bool = False) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none.

    With `skip_damaged` the newest that is whole, and those after it are removed.

    Raises:
        CheckpointError: the newest is damaged; names it, what is wrong, and the last good one.
    """
    damaged: list[CheckpointError] = []
    good = None
    folders = list_checkpoints(output)
    while folders and good is None:
        try:
            good = read_checkpoint(folders[-1])
        except CheckpointError as error:
            damaged.append(error)
            folders.pop()
    if damaged and (good is None or not skip_damaged):
        way = "no other is whole: --overwrite starts afresh"
        if good is not None:
            way = f"the last good one is {good.folder}: --skip-damaged goes on from there"
        raise CheckpointError(f"{damaged[0]}; {way}")
    for folder in list_checkpoints(output)[len(folders) :]:
        discard(folder)
    return good


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a state as `folder`: whole, on the disk, and under its name only then.

    Tensors in the CPU's memory are written from where they are.

    Raises:
        CheckpointError: names the folder, the bytes it needs and those that are free.
    """
    tensors: dict[str, Tensor] = {}
    body = {"format": FORMAT, "state": _without_tensors(state, "state", tensors)}
    partial = hidden(folder, "partial")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS)
        body["tensors_sha256"] = _sha256(partial / TENSORS)
        (partial / STATE).write_text(json.dumps({"sha256": _digest(body), **body}) + "\n", encoding="utf-8")
        for path in (partial / TENSORS, partial / STATE, partial):
            sync(path)
        if folder.exists():
            discard(folder)
        partial.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(cannot_write(folder, bytes_of(state), error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, after both files were read through and compared with their checksums.

    Raises:
        CheckpointError: a file is missing, cut off, or not what was written; names it.
        ValueError: a format that this version does not read.
    """
    try:
        body = json.loads((folder / STATE).read_text(encoding="utf-8"))
        intact = _digest({key: value for key, value in body.items() if key != "sha256"}) == body["sha256"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged: {error}") from error
    if not intact:
        raise CheckpointError(f"{folder / STATE} is damaged: it is not what was written, by its checksum")
    if body["format"] != FORMAT:
        raise ValueError(f"{folder}: a checkpoint of format {body['format']}; this version of c2r reads {FORMAT}")
    try:
        intact = _sha256(folder / TENSORS) == body["tensors_sha256"]
    except OSError as error:
        raise CheckpointError(f"{folder / TENSORS} is damaged: {error}") from error
    if not intact:
        raise CheckpointError(f"{folder / TENSORS} is damaged: it is not what was written, by its checksum")
    return Checkpoint(folder, body["state"])


def bytes_of(state: Any) -> int:
    """Bytes of a state's tensors."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(bytes_of, values))


def _without_tensors(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with the names of its tensors in their place; the tensors are put into `tensors`."""
    if isinstance(node, Tensor):
        found = node.detach().cpu().contiguous()
        twice = any(found.data_ptr() == other.data_ptr() for other in tensors.values())  # which the format refuses
        tensors[name] = found.clone() if twice else found
        return {_MARK: name}
    if isinstance(node, dict):
        return {key: _without_tensors(value, f"{name}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_without_tensors(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
    return node


def _with_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if _MARK in node:
            return tensors[node[_MARK]]
        return {key: _with_tensors(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_tensors(value, tensors) for value in node]
    return node


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of torch's own generators, on the CPU and on the device."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Take up the state of `rng_state`; another device's is left alone."""
    torch.set_rng_state(state["cpu"].clone())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
