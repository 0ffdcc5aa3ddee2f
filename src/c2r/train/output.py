"""A run's folder: whose it is, what run stands in it, and what c2r may do with it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from c2r.config import RunConfig, parse_config
from c2r.methods import RESERVED
from c2r.train.checkpoint import LEFT_OVER, hidden, sweep, sync

RUN_FILE, METRICS_FILE = "run.yaml", "metrics.jsonl"
RUN_MARK = "# Written by c2r: the configuration of the run in this folder.\n"
"""First line of a recorded configuration; a folder without it is not ours to overwrite."""
OPERATIONAL = (
    "output", "tracking", "cache.path", "train.device", "train.log_every", "train.checkpoint_every",
    "train.keep_checkpoints",
)  # fmt: skip
"""What may change between the parts of a run: it has no say in the weights (on one kind of device)."""


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Make the folder, and hold it while entered, so that no two processes train in it.

    Raises:
        ValueError: it cannot be made, or another process holds it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: cannot make the folder {output}: {error.strerror}") from error
    try:
        import fcntl
    except ImportError:  # Windows has no such locks on folders
        yield
        return
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output: another process is training in {output}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def check_output(config: RunConfig, *, overwrite: bool) -> None:
    """Refuse a folder with anything but this very run in it, or a run that may be overwritten.

    Raises:
        ValueError: says what is there; of another configuration, where it differs.
    """
    output = config.output
    foreign = sorted(path.name for path in output.iterdir() if not _is_ours(path))
    if foreign:
        raise ValueError(
            f"output: {output} holds something else ({', '.join(foreign[:5])}); give a new or empty folder"
        )
    sweep(output)
    if overwrite or not any(output.iterdir()):
        return
    if not (output / RUN_FILE).is_file():
        raise ValueError(
            f"output: {output} holds remains of a run; give another folder, delete this one, or `c2r train --overwrite`"
        )
    check_same(yaml.safe_load((output / RUN_FILE).read_text(encoding="utf-8")), config)


def check_same(recorded: Any, config: RunConfig) -> None:
    """Refuse to go on with a run of another configuration.

    Raises:
        ValueError: each difference on a line.
    """
    lines = differences(recorded, config)
    if lines:
        raise ValueError(
            f"output: {config.output} holds an earlier run; give another folder, or --overwrite to replace it. It "
            f"cannot be gone on with, because its configuration differs:\n" + "\n".join(f"  {line}" for line in lines)
        )


def differences(recorded: Any, config: RunConfig) -> list[str]:
    """What a recorded configuration has otherwise than `config`, defaults filled in, `OPERATIONAL` keys aside."""
    try:
        before = _flat(_full(parse_config(recorded, RUN_FILE)))
    except (ValueError, AttributeError) as error:
        return [f"as recorded it cannot be read: {error}"]
    now = _flat(_full(config))
    told = [key for key in {**before, **now} if not _operational(key) and before.get(key) != now.get(key)]
    return [f"{key}: {_shown(before, key)} there, {_shown(now, key)} here" for key in told]


def finished(config: RunConfig) -> bool:
    """Whether the run in the folder came to its end: every SAE is there, trained on all tokens."""
    try:
        texts = [(config.output / sae.name / "cfg.json").read_text(encoding="utf-8") for sae in config.saes]
        states = [json.loads(text)["c2r"]["state"] for text in texts]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(state["stopped"] is None and state["tokens"] == config.train.tokens for state in states)


def prepare_output(config: RunConfig, *, overwrite: bool) -> None:
    """Clear an earlier run if it is to be overwritten, and record the configuration as it was written."""
    if overwrite:  # the record goes first: what a kill leaves is then no run to go on with
        for path in sorted(config.output.iterdir(), key=lambda path: path.name != RUN_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    sweep(config.output / "checkpoints")
    partial = hidden(config.output / RUN_FILE, "partial")
    partial.write_text(RUN_MARK + yaml.safe_dump(as_written(config), sort_keys=False, allow_unicode=True), "utf-8")
    sync(partial)
    partial.replace(config.output / RUN_FILE)


def as_written(config: RunConfig) -> dict[str, Any]:
    """The configuration without its defaults."""
    return config.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _is_ours(path: Path) -> bool:
    """Whether c2r wrote this into a run's folder: only that is ever overwritten."""
    try:
        if path.name == RUN_FILE:
            return path.read_text(encoding="utf-8").startswith(RUN_MARK)
        if (path / "cfg.json").is_file():
            return "c2r" in json.loads((path / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return path.name in RESERVED or bool(LEFT_OVER.fullmatch(path.name))


def _full(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    below = {name: leaf for k, v in items for name, leaf in _flat(v, f"{key}.{k}" if key else str(k)).items()}
    return below or {key: node}


def _operational(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in OPERATIONAL)


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "nothing"
