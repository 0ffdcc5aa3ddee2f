"""The command line. Commands import heavy modules themselves, so that `c2r --help` is fast."""

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

from c2r.layout import EVALUATIONS
from c2r.version import __version__


def demo(out: Path = Path("runs/demo")) -> None:
    """Train a baseline SAE and the same SAE with C²R, and compare them; takes minutes on a laptop, needs no download.

    Args:
        out: Output folder. A finished demo there is replaced, an interrupted one is resumed.
    """
    from c2r.demo import run_demo

    run_demo(out.expanduser())


def train(
    run: Positional[Path],
    set: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(metavar="A.B=C")] = (),
    overwrite: bool = False,
    skip_damaged: bool = False,
) -> None:
    """Train the SAEs described by a YAML file. Interrupted runs resume: run the same command again.

    Args:
        run: YAML file of the run (see docs/guides/configuration.md).
        set: Values that override the file's, for example train.lr=3e-4 saes.0.k=16.
        overwrite: Delete an earlier run in the output folder and start from scratch.
        skip_damaged: If the newest checkpoint is corrupt, resume from the most recent intact one.
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
    """Write a run's training activations to disk; `c2r train` then reads them without running the language model.

    Interrupted harvests resume: run the same command again.

    Args:
        run: YAML file of the run, with a section `cache` (see docs/guides/activations-on-disk.md).
        set: Values that override the file's, for example cache.path=/data/acts.
        verify: First verify the checksums of everything already on disk, and regenerate what is corrupt.
    """
    from c2r.activations.harvest import fill_cache
    from c2r.config.load import load_config

    changes = [value for values in set for value in values]
    folder = fill_cache(load_config(run, tuple(changes)), verify=verify)
    command = ["c2r", "train", _argument(run), *(["--set", *changes] if changes else [])]
    print(f"{folder}\nnext: {shlex.join(command)}")


def _evaluations(config: Any, folders: dict[str, Path]) -> list[str]:
    """Shell commands that evaluate a run's SAEs: one per hook point, comparing the SAEs that read it."""
    from c2r.config.known_features import SyntheticConfig

    together: dict[Any, list[str]] = {}
    for sae in config.saes:
        together.setdefault(config.point(sae), []).append(_argument(folders[sae.name]))
    known = isinstance(config.data, SyntheticConfig)
    options = ["--suite", "recovery"] if known else ["--trust-remote-code"] if config.model.trust_remote_code else []
    return [shlex.join(["c2r", "eval", *saes, *options]) for saes in together.values()]


def _argument(path: Path) -> str:
    """The path as an argument; one that begins with `-` gets a `./`, so that it is not parsed as an option."""
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
    """Evaluate SAEs written by c2r or SAELens: writes one JSON file per evaluation and SAE, and prints a table.

    Args:
        saes: SAE folders. All must read the same hook point.
        model: Language model: embedded, a folder or a Hugging Face Hub id. Default: the one the SAE was trained on.
        layer: Index of the transformer block that the SAE reads, from 0. Default: from the SAE's cfg.json.
        hook: Hook point in that block: resid_pre, resid_post, mlp_out or attn_out. Default: from the SAE's cfg.json.
        suite: Comma-separated list of evaluations: core, absorption, splitting, probing, autointerp, audit, recovery,
            stability, or saebench:NAME to run an evaluation of an installed sae-bench.
        out: Folder for the results. Default: a folder evaluations/ next to each SAE folder.
        source: Source of the text: stdlib, files or hf. Default: the SAE's training text, its held-out part if it has
            one.
        path: For files: a file, folder or glob pattern. For hf: the name of the data set.
        split: For hf: the split of the data set. Default: train.
        text_field: Field that contains the text in .jsonl files and data sets. Default: text.
        context: Tokens per row. Default: as in training.
        tokens: Number of tokens to evaluate on.
        probe_data: For probing: a .jsonl file with the fields text and label, or a data set. Default: tasks made from
            Python's standard library.
        set: Any other evaluation setting, for example absorption.seeds=5 data.context=256 (see the reference).
        seed: Random seed of the text's order and of the evaluations.
        device: auto, cpu, cuda, cuda:1…
        trust_remote_code: Allow a model to execute Python code that it ships.
        judge_url: For autointerp: base URL of an OpenAI-compatible endpoint. Put its API key in $C2R_JUDGE_KEY.
        judge_model: For autointerp: name of the judge model at the endpoint.
        judge_latents: For autointerp: latents to judge per SAE, with two requests each. Default: 100.
        judge_options: For autointerp: extra request fields as a JSON object, such as '{"temperature": 0}'.
        max_requests: For autointerp: refuse to start if more requests than this would be needed.
        key_in_clear: For autointerp: allow sending the API key unencrypted (http) to another machine.
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
        print(f"results: {out or ', '.join(sorted({str(folder.parent / EVALUATIONS) for folder in saes}))}")
    if results.failed:
        lines = "\n".join(f"  {line}" for line in results.failed)
        raise ValueError(f"some evaluations failed; the results of all others were written:\n{lines}")


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'judge.options: got {text!r}; expected a JSON object such as {{"temperature": 0}}')
    return found


def _with_changes(settings: dict[str, Any], changes: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """The settings with `--set a.b=c` applied."""
    from c2r.config.load import set_values

    settings = {name: value for name, value in settings.items() if value is not None}
    set_values(settings, [value for values in changes for value in values])
    return settings


def study(
    path: Positional[Path],
    set: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(metavar="A.B=C")] = (),
) -> None:
    """Train several arms with several seeds, evaluate them, and compare them over the seeds; resumes where it stopped.

    Args:
        path: The study's YAML.
        set: Values that replace the file's, for example seeds=[0,1,2] run.train.tokens=1e6.
    """
    from c2r.config.study import load_study
    from c2r.study import run_study

    print(run_study(load_study(path, tuple(value for values in set for value in values))))


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
    """Describe one SAE, written by c2r or SAELens, in plain words: findings in the terminal and as an HTML page.

    Args:
        sae: SAE folder.
        model: Language model: embedded, a folder or a Hugging Face Hub id. Default: the one the SAE was trained on.
        layer: Index of the transformer block that the SAE reads, from 0. Default: from the SAE's cfg.json.
        hook: Hook point in that block: resid_pre, resid_post, mlp_out or attn_out. Default: from the SAE's cfg.json.
        out: Folder for the page and its figures. Default: a folder evaluations/ next to the SAE folder.
        source: Source of the text: stdlib, files or hf. Default: the SAE's training text, its held-out part if it has
            one.
        path: For files: a file, folder or glob pattern. For hf: the name of the data set.
        split: For hf: the split of the data set. Default: train.
        text_field: Field that contains the text in .jsonl files and data sets. Default: text.
        tokens: Number of tokens to run the SAE on.
        seed: Random seed of the text's order.
        device: auto, cpu, cuda, cuda:1…
        trust_remote_code: Allow a model to execute Python code that it ships.
    """
    from c2r.eval.suite import evaluate as evaluate_saes
    from c2r.report.audit import print_audit, write_audit

    sae = sae.expanduser()
    folder = (out or sae.parent / EVALUATIONS).expanduser()
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
    write_audit(page, result)
    print(f"page: {page}")


def _text(changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of the text that were given on the command line; a path without a source implies files."""
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
"""Command-line options by the name of the evaluation setting that they set."""


def _as_options(message: str, arguments: list[str]) -> str:
    """An error message of the library with the names of settings replaced by command-line options."""
    if arguments[:1] not in (["eval"], ["audit"]):
        return message
    return re.sub(r"^[a-z_.]+(?=: )", lambda name: _OPTIONS.get(name[0], name[0]), message, flags=re.MULTILINE)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a mistake of the user is reported in one line, with exit status 2."""
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
        raise SystemExit(getattr(stopped, "status", 130)) from None  # `status` is set if SIGTERM stopped training


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo, "harvest": harvest, "train": train, "eval": evaluate, "audit": audit,
    "study": study,
}  # fmt: skip
_ABOUT = "Train sparse autoencoders (SAEs) with cross-sample consistency regularisation (C²R), and measure its effect."

if __name__ == "__main__":
    main()
