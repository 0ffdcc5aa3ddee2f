"""Evaluate SAE folders: the model loaded once, every SAE on the same text, one JSON an evaluation and SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from c2r.activations.identify import Identity, identity_of
from c2r.config.base import at_home
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.absorption.evaluation import AbsorptionEvaluation, run_absorption
from c2r.eval.audit.evaluation import run_audit
from c2r.eval.autointerp.evaluation import NEEDED, run_autointerp
from c2r.eval.autointerp.judge import JudgeConfig, endpoint_of
from c2r.eval.bench import FAILURES, Bench, Cache, Evaluation, ModelFree, Outcome, Setting, failure
from c2r.eval.core import run_core
from c2r.eval.probing.evaluation import run_probing
from c2r.eval.probing.labelled import check_labelled
from c2r.eval.provenance import data_of, model_of, text_of_all
from c2r.eval.recovery import run_recovery
from c2r.eval.results import unfinished, write_result
from c2r.eval.saebench.evaluation import PREFIX, foreign_suites
from c2r.eval.saebench.handover import check_installed
from c2r.eval.splitting.evaluation import run_splitting
from c2r.eval.stability import run_stability
from c2r.identity import ACTIVATIONS, differences, of_tensors, versions
from c2r.interop.saelens import load_sae
from c2r.language_model.model import load_language_model
from c2r.machine import pick_device
from c2r.sae.model import SAE
from c2r.storage import check_writable
from c2r.text.packing import check_source

Summary = dict[str, float | None]
Run = Callable[[dict[str, SAE]], Iterator[Outcome]]
SUITES: dict[str, Evaluation] = {
    "core": run_core,
    "absorption": run_absorption,
    "splitting": run_splitting,
    "probing": run_probing,
    "autointerp": run_autointerp,
    "audit": run_audit,
}
"""Name on the command line → evaluation. A new evaluation is a function and a row."""
MODEL_FREE: dict[str, ModelFree] = {"recovery": run_recovery, "stability": run_stability} | foreign_suites()
"""The same for those that need no language model of ours; where no other is asked for, none is loaded."""


class EvaluationError(ValueError):
    """Some evaluations failed; all others are written, and are in `results` as `evaluate` returns them."""

    def __init__(self, failed: list[str], results: dict[str, Summary]) -> None:
        lines = "\n".join(f"  {line}" for line in failed)
        super().__init__(f"evaluations failed, the others are written:\n{lines}")
        self.results = results


def evaluate(
    folders: list[Path],
    out: Path | None = None,
    *,
    suites: tuple[str, ...] = ("core", "splitting"),
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    data: dict[str, Any] | None = None,
    tokens: int = 50_000,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    cache: Path | None = None,
    judge: JudgeConfig | None = None,
    probe_data: str | None = None,
    absorption: AbsorptionEvaluation | None = None,
    console: Console | None = None,
) -> dict[str, Summary]:
    """Evaluate SAEs that read the same hook point; every result is on disk as soon as it is known.

    Decoder norms are folded first, so that an SAE has the same figures however its norms are written.

    Arguments:
        folders: SAE folders, c2r's or SAELens's.
        out: where result files go; None: `evaluations/` beside each SAE folder.
        suites: names in `SUITES` and `MODEL_FREE`.
        model: name of the language model; None: the one each SAE was trained on.
        data: settings of the text (`DataConfig`) that replace those of training. The part that training left
            out is read, where there is one; else all, which is said. SAEs of different text need a text named here.
        layer: block that the SAEs read, counted from 0; None: what each file says.
        hook: hook point in that block (resid_pre, resid_post, mlp_out, attn_out); None: what each file says.
        tokens: real tokens to evaluate on.
        trust_remote_code: whether code that a model brings may run; an SAE's own word on that is not taken.
        cache: folder for activations; None: `$C2R_CACHE`, or `c2r` in the user's cache folder.
        judge: whom autointerp asks.
        probe_data: labelled texts for "probing", a .jsonl file or a data set; None: the standard library's.
        absorption: settings of "absorption" (seeds, prompts, thresholds); None: the canonical ones.

    Returns:
        What the table shows of each SAE, by name.

    Raises:
        ValueError: an unknown suite, a folder that is no SAE, SAEs of different hook points or different text, a model
            that does not fit, or text without tokens.
        EvaluationError: at the very end, when all other results are written: evaluations that failed, or whose result
            could not be written where it belongs; it is then in a temporary folder that the message names.
    """
    console = console or Console(stderr=True)
    model, probe_data = (None if name is None else at_home(name) for name in (model, probe_data))
    for suite in suites:
        if suite not in SUITES | MODEL_FREE:
            raise ValueError(f"--suite: got {suite!r}; accepted are {', '.join(SUITES | MODEL_FREE)}")
    if "autointerp" in suites:
        if judge is None:
            raise ValueError(NEEDED)
        endpoint_of(judge)
    if any(suite.startswith(PREFIX) for suite in suites):
        if layer is not None or hook is not None:
            raise ValueError(f"layer, hook: given beside {PREFIX}…, where each SAE's file says what it reads")
        check_installed()
    if tokens < 1:
        raise ValueError(f"--tokens: got {tokens}; accepted are whole numbers ≥ 1")
    if not folders:
        raise ValueError("no SAE folder given")
    if probe_data is not None:
        check_labelled(probe_data)
    chosen_device = pick_device(device)
    names = _names([folder.expanduser() for folder in folders])
    saes = {name: load_sae(folder).with_unit_rows().to(chosen_device) for name, folder in names.items()}
    out = None if out is None else out.expanduser()
    results = {name: out or folder.parent / "evaluations" for name, folder in names.items()}
    for folder in dict.fromkeys(results.values()):
        check_writable(folder, "out")
    kept = Cache(cache)
    settings: dict[str, Any] = {"tokens": tokens, "seed": seed}
    alone = Setting(tokens, seed, console, chosen_device, kept, model)
    runs: dict[str, Run] = {suite: partial(run, alone) for suite, run in MODEL_FREE.items()}
    bench, identity = None, {"activations": ACTIVATIONS, "code": versions()}
    if not set(suites) <= set(MODEL_FREE):
        models = {}
        for name, sae in saes.items():
            with _naming(names[name]):
                models[name] = model_of(sae.config, model, trust_remote_code, layer=layer, hook=hook)
                data_of(sae.config, data or {})  # so that what is wrong is said with its folder
        text = text_of_all({name: sae.config for name, sae in saes.items()}, data or {})
        bench = _bench(saes, models, text, tokens, seed, chosen_device, kept, console)
        bench.judge, bench.probe_data = judge, probe_data
        settings |= {
            "model": bench.model.model_dump(mode="json"),
            "data": bench.data.model_dump(mode="json"),
            "held_out": bench.held_out,
        }
        identity = identity_of(bench.data, bench.lm, held_out=True)
        for name, sae in saes.items():
            _say_of_another_model(name, sae, identity, console)
        runs |= {suite: partial(run, bench) for suite, run in SUITES.items()}
        if absorption is not None:
            runs["absorption"] = partial(run_absorption, bench, settings=absorption)
    digests = {name: of_tensors(sorted(sae.state_dict().items())) for name, sae in saes.items()}
    summaries: dict[str, Summary] = {name: unfinished(sae.config) for name, sae in saes.items()}
    for name, cut in ((name, cut) for name, cut in summaries.items() if cut):
        console.print(
            f"[yellow]{name}: training was stopped after {cut['trained_tokens']:,} of {cut['train_tokens']:,} tokens; "
            "its figures are those of an unfinished SAE[/]", soft_wrap=True,
        )  # fmt: skip
    failed: list[str] = []
    for suite in suites:
        # sae-bench loads a language model of its own.
        with bench.lm_on_cpu() if bench is not None and suite.startswith(PREFIX) else nullcontext():
            for outcome in _outcomes(suite, runs[suite], saes):
                if outcome.error is not None:
                    failed.append(f"{outcome.sae}, {outcome.evaluation}: {outcome.error}")
                    console.print(f"[red]{escape(failed[-1])}[/]")
                    continue
                summaries[outcome.sae] |= outcome.summary
                sae = saes[outcome.sae]
                try:
                    write_result(
                        results[outcome.sae],
                        evaluation=outcome.evaluation,
                        sae_name=outcome.sae,
                        sae_config=sae.config,
                        config=settings | {"identity": identity | {"sae": digests[outcome.sae]}} | outcome.config,
                        metrics=outcome.metrics,
                        details=outcome.details,
                        unstructured=outcome.unstructured | {"summary": outcome.summary | unfinished(sae.config)},
                        file=outcome.file,
                        console=console,
                    )
                except ValueError as error:
                    failed.append(f"{outcome.sae}, {outcome.evaluation}: {error}")
                    console.print(f"[red]{escape(failed[-1])}[/]")
    if failed:
        raise EvaluationError(failed, summaries)
    return summaries


def _say_of_another_model(name: str, sae: SAE, identity: Identity, console: Console) -> None:
    """Say that an SAE is read on another model or tokenizer than it was trained on, where its file tells."""
    trained = sae.config.get("c2r", {}).get("identity", {})
    parts = {part: trained[part] for part in ("model", "tokenizer") if part in trained}
    found = differences(parts, identity, "in training", "now")
    if found:
        console.print(f"[yellow]{name} was trained on another model: {'; '.join(found)}[/]", soft_wrap=True)


def _outcomes(suite: str, run: Run, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """A suite's outcomes; what it raises as a whole is the failure of every SAE that has none yet."""
    without = list(saes)
    try:
        for outcome in run(saes):
            without.remove(outcome.sae)
            yield outcome
    except FAILURES as error:
        yield from (failure(name, suite, error) for name in without)


def _bench(
    saes: dict[str, SAE],
    models: dict[str, ModelConfig],
    text: DataConfig,
    tokens: int,
    seed: int,
    device: torch.device,
    cache: Cache,
    console: Console,
) -> Bench:
    """Load the language model that all of `saes` read.

    Raises:
        ValueError: SAEs of different hook points or text, or of another width than the model's activations.
    """
    first = next(iter(models.values()))
    for name, other in models.items():
        if other != first:
            raise ValueError(f"{name} reads {other}, but {next(iter(models))} reads {first}; evaluate them apart")
    check_source(text)
    lm = load_language_model(first, device)
    lm.check_data(text, first.name)
    for name, sae in saes.items():
        if sae.d_in != lm.d_in:
            raise ValueError(f"{name}: the SAE reads activations of width {sae.d_in}, the model's have {lm.d_in}")
    console.print(f"evaluating on {text.path or text.source}, rows of {text.context} tokens", highlight=False)
    bench = Bench(lm, first, text, tokens, seed, cache, console)
    if not bench.held_out:
        console.print("[yellow]this source keeps no part from training; the text may have been trained on[/]")
    return bench


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Say in which folder `cfg.json` has the fault that is found."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("cfg.json: ", f"{folder}/cfg.json: ", 1)) from error


def _names(folders: list[Path]) -> dict[str, Path]:
    """A name a folder: its own, with its parent's where that is needed to tell them apart."""
    own = [folder.resolve().name for folder in folders]
    names = own if len(set(own)) == len(own) else [f"{f.resolve().parent.name}_{f.resolve().name}" for f in folders]
    if len(set(names)) < len(names):
        raise ValueError(
            f"SAE folders: {', '.join(map(str, folders))} cannot be told apart by name; evaluate them apart"
        )
    return dict(zip(names, folders, strict=True))
