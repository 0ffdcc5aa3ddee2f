"""Evaluate SAE folders: the model is loaded once, every SAE sees the same text, each result is its own JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from c2r.activations.identify import Identity, identity_of
from c2r.config.evaluations import EvaluationConfig
from c2r.config.faults import checked_section
from c2r.config.run import ModelConfig
from c2r.eval.absorption.evaluation import run_absorption
from c2r.eval.audit.evaluation import run_audit
from c2r.eval.autointerp.evaluation import NEEDED, run_autointerp
from c2r.eval.autointerp.judge import endpoint_of
from c2r.eval.bench import Bench, Evaluation, Reading
from c2r.eval.core import run_core
from c2r.eval.disk_cache import Cache
from c2r.eval.outcome import FAILURES, Outcome, Results, Summary, failure
from c2r.eval.probing.evaluation import run_probing
from c2r.eval.probing.labelled import check_labelled
from c2r.eval.provenance import data_of, model_of, text_of_all
from c2r.eval.recovery import run_recovery
from c2r.eval.results import unfinished, write_result
from c2r.eval.saebench.evaluation import FOREIGN, PREFIX, run_foreign
from c2r.eval.saebench.handover import check_installed
from c2r.eval.splitting.evaluation import run_splitting
from c2r.eval.stability import run_stability
from c2r.identity import ACTIVATIONS, differences, of_tensors, versions
from c2r.interop.saelens import load_sae
from c2r.language_model.model import load_language_model
from c2r.layout import EVALUATIONS
from c2r.machine import pick_device
from c2r.sae.model import SAE
from c2r.storage import check_writable
from c2r.text.packing import check_source, held_out_kept


class Suite(NamedTuple):
    """One evaluation by its name."""

    run: Evaluation
    reads_text: bool = True
    """Whether it needs the language model and the text; if no suite does, neither is loaded."""


SUITES: dict[str, Suite] = {
    "core": Suite(run_core),
    "absorption": Suite(run_absorption),
    "splitting": Suite(run_splitting),
    "probing": Suite(run_probing),
    "autointerp": Suite(run_autointerp),
    "audit": Suite(run_audit),
    "recovery": Suite(run_recovery, reads_text=False),
    "stability": Suite(run_stability, reads_text=False),
    **{PREFIX + name: Suite(run_foreign(name), reads_text=False) for name in FOREIGN},
}
"""A new evaluation is a function and a row."""


def evaluate(
    folders: Sequence[Path | str],
    out: Path | str | None = None,
    config: EvaluationConfig | None = None,
    *,
    console: Console | None = None,
    **settings: Any,
) -> Results:
    """Evaluate SAEs that read the same hook point; every result is on disk as soon as it is known.

    Decoder norms are folded into the activations first, so an SAE has the same figures however its norms are stored.
    If one SAE or evaluation fails, all others still complete; `Results.failed` lists the failures.

    Arguments:
        folders: SAE folders written by c2r or SAELens.
        out: where result files go; None: `evaluations/` beside each SAE folder.
        config: the settings.
        console: where progress is shown; None: the standard error.
        settings: fields of `EvaluationConfig` by name, which replace those of `config`, such as
            `suites=("core", "absorption")` or `tokens=20_000`.

    Raises:
        ValueError: a setting that is refused, an unknown suite, a folder without an SAE, SAEs of different hook points
            or different text, a model that does not fit, or text without tokens; raised before any evaluation.
    """
    console = console or Console(stderr=True)
    given = dict(config or {}) | {name: value for name, value in settings.items() if value is not None}
    config = checked_section(EvaluationConfig, given)
    if not folders:
        raise ValueError("folders: got none; give the folder of at least one SAE")
    _check_suites(config)
    device = pick_device(config.device)
    names = _names([Path(folder).expanduser() for folder in folders])
    saes = {name: load_sae(folder).with_unit_rows().to(device) for name, folder in names.items()}
    where = {
        name: folder.parent / EVALUATIONS if out is None else Path(out).expanduser() for name, folder in names.items()
    }
    for folder in dict.fromkeys(where.values()):
        check_writable(folder, "out")
    bench = Bench(config, Cache(config.cache), console, device)
    if any(SUITES[suite].reads_text for suite in config.suites):
        bench.reading = _reading(saes, names, bench)
    recorded = _recorded(bench, saes)
    figures: dict[str, Summary] = {name: unfinished(sae.config) for name, sae in saes.items()}
    for name, cut in ((name, cut) for name, cut in figures.items() if cut):
        console.print(
            f"[yellow]{name}: training was stopped after {cut['trained_tokens']:,} of {cut['train_tokens']:,} tokens; "
            "its figures are those of an unfinished SAE[/]", soft_wrap=True,
        )  # fmt: skip
    results = Results(figures, {name: [] for name in saes}, [])
    for suite in config.suites:
        # sae-bench loads a language model of its own.
        with bench.lm_on_cpu() if suite.startswith(PREFIX) else nullcontext():
            for outcome in _outcomes(suite, bench, saes):
                _keep(outcome, results, where[outcome.sae], saes[outcome.sae], recorded[outcome.sae], console)
    return results


def _check_suites(config: EvaluationConfig) -> None:
    """Refuse what a suite could not do, before anything is loaded.

    Raises:
        ValueError: names the setting.
    """
    for suite in config.suites:
        if suite not in SUITES:
            raise ValueError(f"suites: got {suite!r}; accepted are {', '.join(SUITES)}")
    if "autointerp" in config.suites:
        if config.judge is None:
            raise ValueError(NEEDED)
        endpoint_of(config.judge)
    if any(suite.startswith(PREFIX) for suite in config.suites):
        for name, value in (("layer", config.layer), ("hook", config.hook)):
            if value is not None:
                raise ValueError(f"{name}: got {value!r}, but {PREFIX}… takes the hook point from each SAE's file")
        check_installed()
    if config.probe_data is not None:
        check_labelled(config.probe_data)


def _recorded(bench: Bench, saes: dict[str, SAE]) -> dict[str, dict[str, Any]]:
    """What each SAE's result files say of settings and identities."""
    settings: dict[str, Any] = {"tokens": bench.config.tokens, "seed": bench.config.seed}
    identity: Identity = {"activations": ACTIVATIONS, "code": versions()}
    if bench.reading is not None:
        settings |= {
            "model": bench.model.model_dump(mode="json"),
            "data": bench.data.model_dump(mode="json"),
            "held_out": bench.held_out,
        }
        identity = identity_of(bench.data, bench.lm, held_out=True)
        for name, sae in saes.items():
            _say_of_another_model(name, sae, identity, bench.console)
    digests = {name: of_tensors(sorted(sae.state_dict().items())) for name, sae in saes.items()}
    return {name: settings | {"identity": identity | {"sae": digest}} for name, digest in digests.items()}


def _keep(
    outcome: Outcome, results: Results, folder: Path, sae: SAE, recorded: dict[str, Any], console: Console
) -> None:
    """Write an outcome's result file and enter it into the results."""
    if outcome.error is None:
        results.figures[outcome.sae].update(outcome.summary)
        try:
            path = write_result(
                folder,
                evaluation=outcome.evaluation,
                sae_name=outcome.sae,
                sae_config=sae.config,
                config=recorded | outcome.config,
                metrics=outcome.metrics,
                details=outcome.details,
                unstructured=outcome.unstructured | {"summary": outcome.summary | unfinished(sae.config)},
                file=outcome.file,
                console=console,
            )
            results.files[outcome.sae].append(path)
        except ValueError as error:
            outcome.error = str(error)
    if outcome.error is not None:
        results.failed.append(f"{outcome.sae}, {outcome.evaluation}: {outcome.error}")
        console.print(f"[red]{escape(results.failed[-1])}[/]")


def _say_of_another_model(name: str, sae: SAE, identity: Identity, console: Console) -> None:
    """Warn if an SAE is evaluated on another model or tokenizer than it was trained on, as far as its file says."""
    trained = sae.config.get("c2r", {}).get("identity", {})
    parts = {part: trained[part] for part in ("model", "tokenizer") if part in trained}
    found = differences(parts, identity, "in training", "now")
    if found:
        console.print(f"[yellow]{name} was trained on another model: {'; '.join(found)}[/]", soft_wrap=True)


def _outcomes(suite: str, bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """A suite's outcomes; if it fails as a whole, every SAE that has none yet gets a failure."""
    without = list(saes)
    try:
        for outcome in SUITES[suite].run(bench, saes):
            without.remove(outcome.sae)
            yield outcome
    except FAILURES as error:
        yield from (failure(name, suite, error) for name in without)


def _reading(saes: dict[str, SAE], folders: dict[str, Path], bench: Bench) -> Reading:
    """Load the language model and find the text that all of `saes` read.

    Raises:
        ValueError: SAEs of different hook points or text, or of another width than the model's activations.
    """
    config, models = bench.config, {}
    for name, sae in saes.items():
        with _naming(folders[name]):
            models[name] = model_of(
                sae.config, config.model, config.trust_remote_code, layer=config.layer, hook=config.hook
            )
            data_of(sae.config, config.data)  # so that an error names its folder
    text = text_of_all({name: sae.config for name, sae in saes.items()}, config.data)
    model = _the_model(models)
    check_source(text)
    lm = load_language_model(model, bench.device)
    lm.check_data(text, model.name)
    for name, sae in saes.items():
        if sae.d_in != lm.d_in:
            raise ValueError(f"{name}: the SAE reads activations of width {sae.d_in}, the model's have {lm.d_in}")
    bench.console.print(f"evaluating on {text.path or text.source}, rows of {text.context} tokens", highlight=False)
    reading = Reading(lm, model, text)
    if not held_out_kept(text):
        bench.console.print("[yellow]this source has no held-out part; the SAEs may have been trained on the text[/]")
    return reading


def _the_model(models: dict[str, ModelConfig]) -> ModelConfig:
    """The model and hook point that all SAEs read.

    Raises:
        ValueError: they differ.
    """
    first = next(iter(models.values()))
    for name, other in models.items():
        if other != first:
            raise ValueError(f"{name} reads {other}, but {next(iter(models))} reads {first}; evaluate them separately")
    return first


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name the folder whose `cfg.json` has an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("cfg.json: ", f"{folder}/cfg.json: ", 1)) from error


def _names(folders: list[Path]) -> dict[str, Path]:
    """A name per folder: its own, with its parent's if that is needed to tell them apart."""
    own = [folder.resolve().name for folder in folders]
    names = own if len(set(own)) == len(own) else [f"{f.resolve().parent.name}_{f.resolve().name}" for f in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"folders: {', '.join(map(str, folders))} have the same names; evaluate them separately")
    return dict(zip(names, folders, strict=True))
