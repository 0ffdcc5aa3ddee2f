"""A run's output folder: who owns it, which run it contains, and what c2r may overwrite or delete in it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from rich.console import Console

from c2r import storage
from c2r.config.load import parse_config
from c2r.config.run import RunConfig
from c2r.layout import CHECKPOINTS, METRICS_FILE, RUN_FILE, SAE_CONFIG, SAE_WEIGHTS, STATE, TENSORS, WANDB

KIND = "run"
RUN_MARK = "# Written by c2r: the configuration of the run in this folder.\n"
"""First line of the configuration file that c2r writes into the folder."""
OPERATIONAL = (
    "output", "tracking", "cache.path", "train.device", "train.log_every", "train.checkpoint_every",
    "train.keep_checkpoints",
)  # fmt: skip
"""Keys that may differ when a run resumes: they do not affect the weights (on the same kind of device)."""
_PLACE = re.compile(r"model\.(name|revision)|data\.(parts\.\d+\.)?(path|revision)")
"""Keys that may differ too: text and model are compared by content, not by location."""


def held(output: Path, console: Console | None = None) -> contextlib.AbstractContextManager[None]:
    """Create the folder, mark it as a run's, and lock it while entered, so that no two processes train in it.

    Raises:
        ValueError: the folder cannot be created or written to, contains files that c2r did not write, or is locked by
            another process.
    """
    _adopt(output)
    return storage.held(output, KIND, "output", "training in", None if console is None else console.print)


def _adopt(output: Path) -> None:
    """Mark the folder of a run from an older c2r without marks, recognised by the first line of its run.yaml."""
    try:
        with (output / RUN_FILE).open(encoding="utf-8") as file:
            ours = file.readline() == RUN_MARK
    except (OSError, ValueError):
        return
    if ours and not (output / storage.MARK).exists():
        saes = [path.parent.name for path in output.glob("*/cfg.json") if _is_an_sae(path)]
        storage.record(output, KIND, patterns_of(saes), "output")


def patterns_of(saes: Iterable[str]) -> list[str]:
    """Patterns of the files that c2r writes for a run with these SAEs; for W&B's files see `_tracked`."""
    found = [RUN_FILE, METRICS_FILE, f"{CHECKPOINTS}/step_*/{TENSORS}", f"{CHECKPOINTS}/step_*/{STATE}"]
    found += ["faulty/step_*.safetensors", "wandb/id"]
    for name in saes:
        found += [f"{name}/{SAE_CONFIG}", f"{name}/{SAE_WEIGHTS}", f"tensorboard/{name}/events.out.tfevents.*"]
        found += [f"evaluations/{name}_*.json", f"evaluations/{name}_*.html", f"evaluations/earlier/{name}_*"]
    return found


def _tracked(output: Path) -> list[str]:
    """Patterns of the files that W&B wrote for this run; its folder names end in the run's id."""
    try:
        run = (output / WANDB / "id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return []
    return [f"wandb/*run-*-{run}/**", "wandb/latest-run", "wandb/debug*.log"] if run.isalnum() else []


def check_output(config: RunConfig, *, overwrite: bool) -> None:
    """Refuse a folder that contains anything but this run, or, with `overwrite`, anything but an earlier run.

    Files that the user added to a run's folder are left alone. They are refused only if the run needs their names.

    Raises:
        ValueError: the folder contains something else, or a run with another configuration; says what differs.
    """
    output, names = config.output, [sae.name for sae in config.saes]
    _adopt(output)
    foreign = storage.strangers(output, KIND) or storage.in_the_way(output, KIND, patterns_of(names))
    if foreign:
        raise ValueError(
            f"output: {output} contains files that c2r did not write ({', '.join(foreign[:5])}); choose a new or "
            "empty folder"
        )
    storage.sweep(output)
    if overwrite:
        return
    if not (output / RUN_FILE).is_file():
        ours = {PurePosixPath(pattern).parts[0] for pattern in storage.recorded(output, KIND)}
        if any((output / name).exists() for name in ours):
            raise ValueError(
                f"output: {output} contains the remains of a deleted run; choose another folder, delete this one, or "
                "run `c2r train --overwrite`"
            )
        return
    check_same(yaml.safe_load((output / RUN_FILE).read_text(encoding="utf-8")), config)


def check_same(recorded: Any, config: RunConfig) -> None:
    """Refuse to resume a run with a different configuration.

    Raises:
        ValueError: the configurations differ; lists the differences, one per line.
    """
    lines = differences(recorded, config)
    if lines:
        raise ValueError(
            f"output: cannot resume the run in {config.output}: the configuration has changed. Choose another folder, "
            "restore the configuration, or replace the run with `c2r train --overwrite`. Changed:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def differences(recorded: Any, config: RunConfig) -> list[str]:
    """Differences between a recorded configuration and `config`, with defaults filled in, except `OPERATIONAL` keys."""
    try:
        before = _flat(_full(parse_config(recorded, RUN_FILE)))
    except (ValueError, AttributeError) as error:
        return [f"the recorded configuration cannot be read: {error}"]
    now = _flat(_full(config))
    changed = [key for key in {**before, **now} if not _operational(key) and before.get(key) != now.get(key)]
    return [f"{key}: was {_shown(before, key)}, is now {_shown(now, key)}" for key in changed]


def finished(config: RunConfig) -> bool:
    """Whether the run in the folder is complete: every SAE has been saved after training on all tokens."""
    try:
        texts = [(config.output / sae.name / SAE_CONFIG).read_text(encoding="utf-8") for sae in config.saes]
        states = [json.loads(text)["c2r"]["state"] for text in texts]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(state["stopped"] is None and state["tokens"] == config.train.tokens for state in states)


def prepare_output(config: RunConfig, *, overwrite: bool, console: Console | None = None) -> None:
    """Delete an earlier run if `overwrite`, then record the configuration as the user wrote it.

    Deletes only what c2r wrote. Symbolic links are deleted, not their targets.

    Raises:
        ValueError: something cannot be deleted or written.
    """
    output = config.output
    if overwrite:  # delete run.yaml first: after a crash, the remains do not look like a run to resume
        try:
            (output / RUN_FILE).unlink(missing_ok=True)
            left = storage.remove_recorded(output, KIND, _tracked(output))
        except OSError as error:
            raise ValueError(f"output: cannot delete {error.filename or output}: {error.strerror}") from error
        if left and console is not None:
            console.print(f"{output}: kept, since c2r did not write them: {', '.join(left)}", soft_wrap=True)
    storage.record(output, KIND, patterns_of(sae.name for sae in config.saes), "output")
    storage.sweep(output / CHECKPOINTS)
    text = yaml.safe_dump(as_written(config), sort_keys=False, allow_unicode=True)
    storage.write_text(output / RUN_FILE, RUN_MARK + text, "output")


def as_written(config: RunConfig) -> dict[str, Any]:
    """The configuration without default values."""
    return config.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _is_an_sae(path: Path) -> bool:
    """Whether c2r wrote this `cfg.json`."""
    try:
        return "c2r" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _full(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists: dotted key → leaf."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    below = {name: leaf for k, v in items for name, leaf in _flat(v, f"{key}.{k}" if key else str(k)).items()}
    return below or {key: node}


def _operational(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in OPERATIONAL) or bool(_PLACE.fullmatch(key))


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "unset"
