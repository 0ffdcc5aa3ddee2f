"""Content and writing of checkpoints: a resumed run equals an uninterrupted one, for every method."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from c2r.config.run import TrainConfig
from c2r.methods import METHODS, AnnealedP, KeptPerBatch
from c2r.neighbors import NeighborTable
from c2r.storage import sweep
from c2r.training import checkpoint
from c2r.training.activity import Activity
from c2r.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    bytes_of,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from c2r.training.run import Run
from small_runs import SCALE, TREE, configured

STEPS, BATCH = 9, 64
CONSISTENCY: dict[str, dict[str, Any] | None] = {
    "none": None,
    "lagged": {"strength": 0.5, "every": 2},
    "exact": {"strength": 0.5, "neighbors": "exact"},
    "chunked": {"strength": 0.5, "neighbors": "chunked"},
    "shuffled_norms": {"strength": 0.5, "ablation": "shuffled_norms"},
}


def new_run(method: str, consistency: str) -> Run[Any]:
    config = configured(method, c2r=CONSISTENCY[consistency], dead_after_tokens=3 * BATCH)
    run = Run(config, TrainConfig(tokens=STEPS * BATCH, batch=BATCH, lr=3e-3), TREE.d_in)
    run.table.rows = 5  # of 24, so that the table's cursor moves
    return run


def batches(start: int = 0) -> Iterator[Tensor]:
    for step in range(start, STEPS):
        yield TREE.sample(BATCH, torch.Generator().manual_seed(step)).x_BD / SCALE


def leaves(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Everything in an object, recursively, by name, except configuration and code."""
    if isinstance(node, torch.Generator):
        yield name, node.get_state().tolist()
    elif isinstance(node, Tensor):
        yield name, (str(node.dtype), node.detach().tolist())
        if node.grad is not None:
            yield f"{name}.grad", node.grad.tolist()
    elif node is None or isinstance(node, bool | int | float | str):
        yield name, node
    elif id(node) not in seen:
        seen.add(id(node))
        items: Any = ()
        if isinstance(node, torch.optim.Optimizer):
            items = {"groups": node.param_groups, "state": list(node.state.values())}.items()
        elif isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list | tuple):
            items = enumerate(node)
        elif type(node).__module__.startswith(("c2r.training", "c2r.neighbors", "c2r.sae", "c2r.methods", "torch.nn")):
            items = vars(node).items()
        for key, value in items:
            yield from leaves(value, f"{name}.{key}", seen)


def everything(run: Run[Any]) -> dict[str, Any]:
    return dict(leaves(run, "run", set()))


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names whose values differ; NaN counts as equal to NaN."""
    return [name for name in {**one, **other} if repr(one.get(name, "?")) != repr(other.get(name, "?"))]


@pytest.mark.parametrize("consistency", list(CONSISTENCY))
@pytest.mark.parametrize("method", list(METHODS))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method: str, consistency: str, tmp_path: Path) -> None:
    run, measured = new_run(method, consistency), []
    for step, x in enumerate(batches()):
        if step in (1, 5):
            write_checkpoint(tmp_path / f"{step}", run.state_dict())
        measured.append(run.step(x))
    for step in (1, 5):
        resumed = new_run(method, consistency)
        resumed.load_state_dict(read_checkpoint(tmp_path / f"{step}").state())
        for x, expected in zip(batches(step), measured[step:], strict=True):
            found = resumed.step(x)
            assert {name: value.item() for name, value in found.items()} == pytest.approx(
                {name: value.item() for name, value in expected.items()}, rel=0, abs=0, nan_ok=True
            )
        assert different(everything(resumed), everything(run)) == []


TRANSIENT = ("run._neighbors", "run.optimizer.groups")
"""Attributes that each step sets before using them."""
PIECES = [
    "step_number", "consistency", "weights", "adam", *NeighborTable().state_dict(),
    *(f"memory.{f.name}" for kept in (KeptPerBatch, AnnealedP) for f in fields(kept)),
    *(f"activity.{name}" for name in Activity(2, 1, torch.device("cpu")).state_dict()),
]  # fmt: skip


@pytest.mark.parametrize("piece", [None, *PIECES])
def test_a_piece_of_state_that_is_forgotten_shows(piece: str | None) -> None:
    """The comparison above can fail: each piece of state matters for some method."""
    found: list[str] = []
    for method, consistency in (("batch_top_k", "shuffled_norms"), ("p_anneal", "chunked"), ("standard", "lagged")):
        run, resumed = new_run(method, consistency), new_run(method, consistency)
        beginning = copy.deepcopy(run.state_dict())
        for x in batches(4):
            run.step(x)
        if method == "batch_top_k":
            run.memory.failures, run.memory.rest = 2, 5  # numbers of the int8 product, which not every machine has
        state = copy.deepcopy(run.state_dict())
        if piece is not None:
            section, _, name = piece.rpartition(".")
            section = "table" if name in state["table"] else section
            part, initial = (s[section] if section else s for s in (state, beginning))
            if name in part:
                part[name] = initial[name]
        resumed.load_state_dict(state)
        found += [n for n in different(everything(resumed), everything(run)) if not n.startswith(TRANSIENT)]
    assert (found == []) == (piece is None)


def test_what_is_new_in_a_run_and_not_in_its_state_shows() -> None:
    run, resumed = (new_run("batch_top_k", "lagged") for _ in range(2))
    run.table.__dict__["swept"] = 3
    assert different(everything(run), everything(resumed)) == ["run.table.swept"]


# Files

STATE: dict[str, Any] = {
    "numbers": [1, 2.5, float("inf"), None, True], "text": "ρ", "empty": {},
    "tensors": {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(7), "c": [torch.zeros(3, dtype=torch.bool)]},
}  # fmt: skip


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.ones(2)
    state = STATE | {"shared": [shared, shared]}
    write_checkpoint(tmp_path / "x", state)
    found = read_checkpoint(tmp_path / "x").state()
    assert repr(found) == repr(state)
    assert found["tensors"]["b"].dtype == torch.int64
    with safe_open(tmp_path / "x" / "tensors.safetensors", "pt") as file:
        assert len(file.keys()) == 5
    assert bytes_of(state) == 6 * 4 + 8 + 3 + 2 * 8


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) * 2 // 3] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_offered(file: str, how: str, tmp_path: Path) -> None:
    folders = [tmp_path / "checkpoints" / f"step_0000000{step}" for step in (1, 2, 3)]
    for step, folder in enumerate(folders):
        write_checkpoint(folder, STATE | {"step": step})
    spoil(folders[2] / file, how)
    with pytest.raises(
        CheckpointError,
        match=rf"step_00000003/{file} is corrupt.*step_00000002; resume from it with `c2r train --skip-damaged",
    ):
        latest_checkpoint(tmp_path)
    spoil(folders[1] / file, how)
    with pytest.raises(CheckpointError, match=r"step_00000003.*last intact one is .*step_00000001"):
        latest_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path) == folders
    found = latest_checkpoint(tmp_path, skip_damaged=True)
    assert found is not None
    assert found.state()["step"] == 0
    assert list_checkpoints(tmp_path) == folders[:1]
    spoil(folders[0] / file, how)
    for skip in (False, True):
        with pytest.raises(
            CheckpointError,
            match=r"step_00000001.*no other checkpoint is intact; start over with `c2r train --overwrite",
        ):
            latest_checkpoint(tmp_path, skip_damaged=skip)


def test_every_single_flipped_byte_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", {"t": torch.arange(3), "n": 1})
    for name in ("state.json", "tensors.safetensors"):
        whole = (tmp_path / "x" / name).read_bytes()
        for at in range(0, len(whole) - 1, 3):  # the last is a newline
            (tmp_path / "x" / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=name):
                read_checkpoint(tmp_path / "x")
        (tmp_path / "x" / name).write_bytes(whole)
    assert read_checkpoint(tmp_path / "x").state()["n"] == 1


@pytest.mark.parametrize("other", [checkpoint.FORMAT - 1, checkpoint.FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_and_kept(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", other)
    write_checkpoint(tmp_path / "checkpoints" / "step_00000001", STATE)
    monkeypatch.undo()
    expected = f"step_00000001: checkpoint format {other}; this version of c2r reads format {checkpoint.FORMAT}"
    with pytest.raises(ValueError, match=expected):
        latest_checkpoint(tmp_path, skip_damaged=True)
    assert len(list_checkpoints(tmp_path)) == 1


def test_the_last_are_kept_and_left_overs_are_swept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, TrainConfig(tokens=1, checkpoint_every=3, keep_checkpoints=2))
    for step in range(1, 13):
        if kept.due(step):
            kept.save(step, STATE)
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step_00000009", "step_00000012"}
    for name in (".step_00000015.0123abcd.partial", ".step_00000009.89abcdef.old", ".mine", "..partial"):
        (folder / name).mkdir()
    sweep(folder)
    assert {path.name for path in folder.iterdir()} == {"step_00000009", "step_00000012", ".mine", "..partial"}


def test_by_default_one_is_due_after_a_minute_or_twenty_times_its_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def slow(folder: Path, state: dict[str, Any]) -> None:
        now[0] += 10

    kept = Checkpoints(tmp_path, TrainConfig(tokens=1))
    due = []
    for now[0] in (1059.0, 1060.0):
        due.append(kept.due(1))
    assert due == [False, True]
    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    kept.save(1, STATE)  # took 10 s, so 200 s until the next
    due = []
    for now[0] in (1269.0, 1270.0):
        due.append(kept.due(2))
    assert due == [False, True]


@pytest.mark.slow
def test_writing_and_reading_do_not_double_memory(tmp_path: Path) -> None:
    """In a new process, so that nothing else affects peak memory: handling 256 MiB needs only slightly more."""
    code = f"""
import resource, torch
from pathlib import Path
from c2r.training.checkpoint import read_checkpoint, write_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous"))
state = {{"x": torch.ones(2**26)}}
before = peak()
write_checkpoint(Path({str(tmp_path / "x")!r}), state)
print(peak() - before)
before = anonymous()
found = read_checkpoint(Path({str(tmp_path / "x")!r})).state()["x"]
state["x"].copy_(found)
print(anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(float(line) < 64 for line in done.stdout.split()), done.stdout
