"""Checkpoints: everything a run needs to resume bit for bit. Writing is atomic: a crash never leaves a partial one.

    output/checkpoints/step_00001234/tensors.safetensors    the state's tensors
    output/checkpoints/step_00001234/state.json             everything else, and checksums of both files

A state is a tree of dicts and lists whose leaves are JSON values or tensors. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r.config.run import TrainConfig
from c2r.layout import CHECKPOINTS, STATE, TENSORS
from c2r.storage import cannot_write, discard, whole

FORMAT = 4
_STEP = re.compile(r"step_(\d{8,})")
_SECONDS, _SHARE = 60.0, 0.05
_MARK = "__tensor__"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is corrupt."""


class Checkpoint(NamedTuple):
    """An intact checkpoint."""

    folder: Path
    tree: dict[str, Any]
    """The state, with each tensor replaced by its name."""

    def state(self) -> dict[str, Any]:
        """The state. Tensors are memory-mapped from the file, so they use little memory until copied."""
        return _with_tensors(self.tree, load_file(self.folder / TENSORS))


class Checkpoints:
    """Decides when the run in `output` is due a checkpoint, and writes it.

    If `train.checkpoint_every` is unset, a checkpoint is due one minute after the last, or after 20 times as long as
    the last took to write if that is longer. A crash then loses about a minute of training, and writing takes at most
    5 % of the time.
    """

    def __init__(self, output: Path, train: TrainConfig) -> None:
        self.output, self.every, self.keep = output, train.checkpoint_every, train.keep_checkpoints
        self.saved, self.cost = time.monotonic(), 0.0

    def due(self, step: int) -> bool:
        """Whether to write a checkpoint after `step` steps."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.saved >= max(_SECONDS, self.cost / _SHARE)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after `step` steps, then delete all but the last `keep_checkpoints` checkpoints.

        Raises:
            CheckpointError: the checkpoint cannot be written; earlier ones are untouched.
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
    """Checkpoint folders of a run, oldest first, without checking that they are intact.

    Anything else in `checkpoints/` belongs to the user and is ignored.
    """
    found = ((_STEP.fullmatch(path.name), path) for path in (output / CHECKPOINTS).glob("step_*"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name and path.is_dir())]


def latest_checkpoint(output: Path, *, skip_damaged: bool = False) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none.

    Arguments:
        skip_damaged: return the newest intact checkpoint, and delete the corrupt ones after it.

    Raises:
        CheckpointError: the newest checkpoint is corrupt; says what is wrong and which earlier one is intact.
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
        way = "no other checkpoint is intact; start over with `c2r train --overwrite`"
        if good is not None:
            way = f"the last intact one is {good.folder}; resume from it with `c2r train --skip-damaged`"
        raise CheckpointError(f"{damaged[0]}; {way}")
    for folder in list_checkpoints(output)[len(folders) :]:
        discard(folder)
    return good


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a state to a temporary folder, flush it to disk, then rename it to `folder`.

    CPU tensors are not copied first.

    Raises:
        CheckpointError: the folder cannot be written; names it, the bytes needed and the bytes free.
    """
    tensors: dict[str, Tensor] = {}
    body = {"format": FORMAT, "state": _without_tensors(state, "state", tensors)}
    try:
        with whole(folder) as partial:
            partial.mkdir(parents=True)
            save_file(tensors, partial / TENSORS)
            body["tensors_sha256"] = _sha256(partial / TENSORS)
            (partial / STATE).write_text(json.dumps({"sha256": _digest(body), **body}) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(cannot_write(folder, bytes_of(state), error)) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify the checksums of both files.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
        ValueError: a checkpoint format that this version does not read.
    """
    try:
        body = json.loads((folder / STATE).read_text(encoding="utf-8"))
        intact = _digest({key: value for key, value in body.items() if key != "sha256"}) == body["sha256"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE} is corrupt: {error}") from error
    if not intact:
        raise CheckpointError(f"{folder / STATE} is corrupt: its checksum does not match")
    if body["format"] != FORMAT:
        raise ValueError(f"{folder}: checkpoint format {body['format']}; this version of c2r reads format {FORMAT}")
    try:
        intact = _sha256(folder / TENSORS) == body["tensors_sha256"]
    except OSError as error:
        raise CheckpointError(f"{folder / TENSORS} is corrupt: {error}") from error
    if not intact:
        raise CheckpointError(f"{folder / TENSORS} is corrupt: its checksum does not match")
    return Checkpoint(folder, body["state"])


def bytes_of(state: Any) -> int:
    """Total size of a state's tensors in bytes."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(bytes_of, values))


def _without_tensors(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor replaced by its name; the tensors are added to `tensors`."""
    if isinstance(node, Tensor):
        found = node.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory
        twice = any(found.data_ptr() == other.data_ptr() for other in tensors.values())
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
    """State of torch's global random generators, on the CPU and on the device."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the state from `rng_state`; a GPU generator's state is restored only if both devices are GPUs."""
    torch.set_rng_state(state["cpu"].clone())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
