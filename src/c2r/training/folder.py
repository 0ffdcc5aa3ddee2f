"""A run's folder: whose it is, what run stands in it, and what c2r may do with it."""

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
from c2r.interop.saelens import CONFIG, WEIGHTS
from c2r.training.checkpoint import CHECKPOINTS, STATE, TENSORS

KIND = "run"
RUN_FILE, METRICS_FILE = "run.yaml", "metrics.jsonl"
RUN_MARK = "# Written by c2r: the configuration of the run in this folder.\n"
"""First line of a recorded configuration."""
OPERATIONAL = (
    "output", "tracking", "cache.path", "train.device", "train.log_every", "train.checkpoint_every",
    "train.keep_checkpoints",
)  # fmt: skip
"""What may change between the parts of a run without changing the weights (on one kind of device)."""
_PLACE = re.compile(r"model\.(name|revision)|data\.(parts\.\d+\.)?(path|revision)")
"""May change too: text and model are compared by their contents, wherever they lie."""


def held(output: Path, console: Console | None = None) -> contextlib.AbstractContextManager[None]:
    """Make the folder, mark it as a run's, and hold it while entered, so that no two processes train in it.

    Raises:
        ValueError: it cannot be made or written in, holds something that is not c2r's, or another process holds it.
    """
    _adopt(output)
    return storage.held(output, KIND, "output", "training in", None if console is None else console.print)


def _adopt(output: Path) -> None:
    """Mark the folder of a run that was made before there were marks: its run.yaml says that c2r wrote it."""
    try:
        with (output / RUN_FILE).open(encoding="utf-8") as file:
            ours = file.readline() == RUN_MARK
    except (OSError, ValueError):
        return
    if ours and not (output / storage.MARK).exists():
        saes = [path.parent.name for path in output.glob("*/cfg.json") if _is_an_sae(path)]
        storage.record(output, KIND, patterns_of(saes), "output")


def patterns_of(saes: Iterable[str]) -> list[str]:
    """What c2r writes into the folder of a run with SAEs of these names; what trackers write aside, see `_tracked`."""
    found = [RUN_FILE, METRICS_FILE, f"{CHECKPOINTS}/step_*/{TENSORS}", f"{CHECKPOINTS}/step_*/{STATE}"]
    found += ["faulty/step_*.safetensors", "wandb/id"]
    for name in saes:
        found += [f"{name}/{CONFIG}", f"{name}/{WEIGHTS}", f"tensorboard/{name}/events.out.tfevents.*"]
        found += [f"evaluations/{name}_*.json", f"evaluations/{name}_*.html", f"evaluations/earlier/{name}_*"]
    return found


def _tracked(output: Path) -> list[str]:
    """What W&B wrote for this run, whose id its folders' names end in."""
    try:
        run = (output / "wandb" / "id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return []
    return [f"wandb/*run-*-{run}/**", "wandb/latest-run", "wandb/debug*.log"] if run.isalnum() else []


def check_output(config: RunConfig, *, overwrite: bool) -> None:
    """Refuse a folder with something else than this very run in it, or a run that may be overwritten.

    What a user put beside a run stays where it is, and is in nobody's way unless it has a name that the run needs.

    Raises:
        ValueError: says what is there; of another configuration, where it differs.
    """
    output, names = config.output, [sae.name for sae in config.saes]
    _adopt(output)
    foreign = storage.strangers(output, KIND) or storage.in_the_way(output, KIND, patterns_of(names))
    if foreign:
        raise ValueError(
            f"output: {output} holds something else ({', '.join(foreign[:5])}); give a new or empty folder"
        )
    storage.sweep(output)
    if overwrite:
        return
    if not (output / RUN_FILE).is_file():
        ours = {PurePosixPath(pattern).parts[0] for pattern in storage.recorded(output, KIND)}
        if any((output / name).exists() for name in ours):
            raise ValueError(
                f"output: {output} holds remains of a run; give another folder, delete this one, or "
                "`c2r train --overwrite`"
            )
        return
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


def prepare_output(config: RunConfig, *, overwrite: bool, console: Console | None = None) -> None:
    """Clear an earlier run if it is to be overwritten, and record the configuration as it was written.

    Only what c2r wrote is removed, links without what they lead to.

    Raises:
        ValueError: something cannot be removed or written.
    """
    output = config.output
    if overwrite:  # the record goes first: what a kill leaves is then no run to resume
        try:
            (output / RUN_FILE).unlink(missing_ok=True)
            left = storage.remove_recorded(output, KIND, _tracked(output))
        except OSError as error:
            raise ValueError(f"output: cannot remove {error.filename or output}: {error.strerror}") from error
        if left and console is not None:
            console.print(f"{output}: left alone, not being part of this run: {', '.join(left)}", soft_wrap=True)
    storage.record(output, KIND, patterns_of(sae.name for sae in config.saes), "output")
    storage.sweep(output / CHECKPOINTS)
    text = yaml.safe_dump(as_written(config), sort_keys=False, allow_unicode=True)
    storage.write_text(output / RUN_FILE, RUN_MARK + text, "output")


def as_written(config: RunConfig) -> dict[str, Any]:
    """The configuration without its defaults."""
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
    """Leaves by dotted key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    below = {name: leaf for k, v in items for name, leaf in _flat(v, f"{key}.{k}" if key else str(k)).items()}
    return below or {key: node}


def _operational(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in OPERATIONAL) or bool(_PLACE.fullmatch(key))


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "nothing"
