"""The command line. Heavy imports happen inside the commands, so that `c2r --help` is quick."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from c2r.version import __version__


def demo(out: Path = Path("runs/demo")) -> None:
    """Train a baseline and its C²R twin on the embedded language model, and show what changed (minutes on a laptop).

    Args:
        out: Folder of the run; an earlier demo there is replaced.
    """
    from c2r.demo import run_demo

    run_demo(out.expanduser())


def train(
    run: Positional[Path],
    set: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(metavar="A.B=C")] = (),
    overwrite: bool = False,
    skip_damaged: bool = False,
) -> None:
    """Train the SAEs that a YAML file describes, or go on with the run of it that was stopped.

    Args:
        run: The run's YAML (see docs/guides/configuration.md).
        set: Values that replace the file's, for example train.lr=3e-4 saes.0.k=16.
        overwrite: Start afresh in place of an earlier run in the output folder.
        skip_damaged: Where the newest checkpoint is damaged, go on from the last that is whole.
    """
    from c2r.config.load import load_config
    from c2r.training.trainer import train as train_run

    config = load_config(run, tuple(value for values in set for value in values))
    folders = train_run(config, overwrite=overwrite, skip_damaged=skip_damaged)
    print("\n".join(map(str, folders.values())))
    for command in _evaluations(config, folders):
        print(f"next: {command}")


def harvest(
    run: Positional[Path],
    set: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(metavar="A.B=C")] = (),
    verify: bool = False,
) -> None:
    """Write the activations that a run trains on to its cache, once; `c2r train` then reads them without the model.

    Stopped in any way, it goes on where it was when it is run again.

    Args:
        run: The run's YAML, with a section `cache` (see docs/guides/activations-on-disk.md).
        set: Values that replace the file's, for example cache.path=/data/acts.
        verify: Compare the checksums of all that is there first, and make anew what is damaged.
    """
    from c2r.activations.harvest import fill_cache
    from c2r.config.load import load_config

    changes = [value for values in set for value in values]
    folder = fill_cache(load_config(run, tuple(changes)), verify=verify)
    command = ["c2r", "train", _argument(run), *(["--set", *changes] if changes else [])]
    print(f"{folder}\nnext: {shlex.join(command)}")


def _evaluations(config: Any, folders: dict[str, Path]) -> list[str]:
    """The commands that evaluate a run's SAEs, ready for a shell: one for each hook point, whose SAEs are compared."""
    from c2r.config.known_features import SyntheticConfig

    together: dict[Any, list[str]] = {}
    for sae in config.saes:
        together.setdefault(config.point(sae), []).append(_argument(folders[sae.name]))
    known = isinstance(config.data, SyntheticConfig)
    options = ["--suite", "recovery"] if known else ["--trust-remote-code"] if config.model.trust_remote_code else []
    return [shlex.join(["c2r", "eval", *saes, *options]) for saes in together.values()]


def _argument(path: Path) -> str:
    """A path that the command line does not take for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def evaluate(
    saes: Positional[tuple[Path, ...]],
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    suite: str = "core,splitting",
    out: Path | None = None,
    source: str | None = None,
    path: str | None = None,
    split: str | None = None,
    text_field: str | None = None,
    context: int | None = None,
    tokens: int = 50_000,
    probe_data: str | None = None,
    set: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(metavar="A.B=C")] = (),
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_latents: int | None = None,
    judge_options: str | None = None,
    max_requests: int | None = None,
    key_in_clear: bool = False,
) -> None:
    """Evaluate SAE folders written by c2r or SAELens: a JSON file per evaluation and SAE, and a table.

    Args:
        saes: SAE folders that read the same hook point.
        model: Language model: embedded, a folder or a Hub id. Default: the one the SAE was trained on.
        layer: Block that the SAE reads, counted from 0. Default: what its file says.
        hook: resid_pre, resid_post, mlp_out or attn_out of that block. Default: what its file says.
        suite: Evaluations, joined by commas.
        out: Folder for the results. Default: evaluations/ beside each SAE.
        source: Text: stdlib, files or hf. Default: that of the SAE's training, its held-out part if there is one.
        path: For files: a file, folder or glob; for hf: the data set.
        split: For hf: the split. Default: train.
        text_field: Field of .jsonl files and data sets that holds the text. Default: text.
        context: Tokens of a row. Default: as in the SAE's training.
        tokens: Tokens to evaluate on.
        probe_data: For probing: a .jsonl file of {"text", "label"} or a data set. Default: the standard library's.
        set: Any setting of an evaluation, for example absorption.seeds=5 data.context=256 (see the reference).
        seed: Order of the text.
        device: auto, cpu, cuda, cuda:1…
        trust_remote_code: Let code that the model brings run.
        judge_url: For autointerp: base address of an OpenAI-compatible endpoint; its key in $C2R_JUDGE_KEY.
        judge_model: For autointerp: the judge's name at the endpoint.
        judge_latents: For autointerp: latents per SAE, two requests each. Default: 100.
        judge_options: For autointerp: further fields of a request as a JSON object, such as '{"temperature": 0}'.
        max_requests: For autointerp: refuse, before the first request, what would take more.
        key_in_clear: For autointerp: let the key be sent to another machine over http.
    """
    from c2r.eval.suite import evaluate as evaluate_saes
    from c2r.report.table import print_results

    text = {"source": source, "path": path, "split": split, "text_field": text_field, "context": context}
    judge = {"url": judge_url, "model": judge_model, "latents": judge_latents, "max_requests": max_requests}
    settings: dict[str, Any] = {
        "suites": tuple(name.strip() for name in suite.split(",")), "tokens": tokens, "seed": seed, "device": device,
        "model": model, "layer": layer, "hook": hook, "trust_remote_code": trust_remote_code, "probe_data": probe_data,
        "data": _text(text), "absorption": {},
    }  # fmt: skip
    if judge_url is not None or judge_model is not None:
        settings["judge"] = {name: value for name, value in judge.items() if value is not None}
        settings["judge"] |= {"options": _json_object(judge_options), "key_in_clear": key_in_clear}
    results = evaluate_saes(list(saes), out, **_with_changes(settings, set))
    if any(results.values()):
        print_results(dict(results))
        print(f"results: {out or ', '.join(sorted({str(folder.parent / 'evaluations') for folder in saes}))}")
    if results.failed:
        lines = "\n".join(f"  {line}" for line in results.failed)
        raise ValueError(f"evaluations failed, the others are written:\n{lines}")


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'judge.options: got {text!r}; accepted is a JSON object such as {{"temperature": 0}}')
    return found


def _with_changes(settings: dict[str, Any], changes: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """Apply `--set a.b=c`."""
    from c2r.config.load import set_values

    settings = {name: value for name, value in settings.items() if value is not None}
    set_values(settings, [value for values in changes for value in values])
    return settings


def audit(
    sae: Positional[Path],
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    out: Path | None = None,
    source: str | None = None,
    path: str | None = None,
    split: str | None = None,
    text_field: str | None = None,
    tokens: int = 50_000,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Say in plain words what can be seen of one SAE, anybody's: a page of findings here and as HTML.

    Args:
        sae: SAE folder, c2r's or SAELens's.
        model: Language model: embedded, a folder or a Hub id. Default: the one the SAE was trained on.
        layer: Block that the SAE reads, counted from 0. Default: what its file says.
        hook: resid_pre, resid_post, mlp_out or attn_out of that block. Default: what its file says.
        out: Folder for the page and its figures. Default: evaluations/ beside the SAE.
        source: Text: stdlib, files or hf. Default: that of the SAE's training, its held-out part if there is one.
        path: For files: a file, folder or glob; for hf: the data set.
        split: For hf: the split. Default: train.
        text_field: Field of .jsonl files and data sets that holds the text. Default: text.
        tokens: Tokens to look at.
        seed: Order of the text.
        device: auto, cpu, cuda, cuda:1…
        trust_remote_code: Let code that the model brings run.
    """
    from c2r.eval.suite import evaluate as evaluate_saes
    from c2r.report.audit import print_audit, write_audit

    sae = sae.expanduser()
    folder = (out or sae.parent / "evaluations").expanduser()
    results = evaluate_saes(
        [sae],
        folder,
        suites=("audit",),
        model=model,
        layer=layer,
        hook=hook,
        data=_text({"source": source, "path": path, "split": split, "text_field": text_field}),
        tokens=tokens,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if results.failed:
        raise ValueError(f"the audit failed: {results.failed[0]}")
    result = folder / f"{sae.resolve().name}_audit.json"
    print_audit(result)
    page = result.with_suffix(".html")
    try:
        write_audit(page, result)
    except OSError as error:
        raise ValueError(f"out: cannot write {page}: {error.strerror}") from error
    print(f"page: {page}")


def _text(changes: dict[str, Any]) -> dict[str, Any]:
    """What the command line says of the text; a path alone means files."""
    data = {name: value for name, value in changes.items() if value is not None}
    return {"source": "files"} | data if "path" in data else data


_OPTIONS = {
    "folders": "SAE folders", "suites": "--suite", "judge.url": "--judge-url", "judge.model": "--judge-model",
    "judge": "--judge-url, --judge-model", "judge.latents": "--judge-latents", "judge.options": "--judge-options",
    "judge.max_requests": "--max-requests", "judge.key_in_clear": "--key-in-clear", "data.source": "--source",
    **{name: f"--{name.replace('_', '-')}" for name in (
        "tokens", "seed", "device", "model", "layer", "hook", "out", "probe_data", "source", "path", "split",
        "text_field", "context",
    )},
}  # fmt: skip
"""What the settings of an evaluation are called on the command line."""


def _as_options(message: str, arguments: list[str]) -> str:
    """A message of the library, which names settings, in the command line's words."""
    if arguments[:1] not in (["eval"], ["audit"]):
        return message
    return re.sub(r"^[a-z_.]+(?=: )", lambda name: _OPTIONS.get(name[0], name[0]), message, flags=re.MULTILINE)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one line and exit status 2."""
    arguments = sys.argv[1:] if args is None else args
    if arguments == ["--version"]:
        print(f"c2r {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="c2r",
            description=_ABOUT,
            args=arguments,
        )
    except ValueError as error:
        print(f"c2r: error: {_as_options(str(error), arguments)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stopped:
        print(f"c2r: {str(stopped) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(stopped, "status", 130)) from None  # training heeds SIGTERM too


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo, "harvest": harvest, "train": train, "eval": evaluate, "audit": audit,
}  # fmt: skip
_ABOUT = "Train sparse autoencoders with cross-sample consistency regularisation (C²R), and measure what it changed."

if __name__ == "__main__":
    main()
