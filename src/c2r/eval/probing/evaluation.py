"""Sparse probing (Gurnee et al. 2023, arXiv 2305.01610, as in SAEBench): how well few latents classify labelled texts.

Each label is classified against an equal number of texts with other labels. Activations are averaged over the tokens of
a text; the k latents with the largest |difference of class means| are selected; an L2-regularised logistic regression
is fitted on them, and its accuracy is measured on held-out texts. For comparison, the same is done with all latents,
and with all and the k best coordinates of x.

D width of the activations · F latents · n real tokens · k tokens that count · P channels, D or F · T texts ·
R texts of one task.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from torch import Tensor

from c2r.activations.counting import Counting, LeftOut, counting_of
from c2r.eval.bench import Bench
from c2r.eval.counted import say_left_out
from c2r.eval.outcome import Outcome, each
from c2r.eval.probing.labelled import LabelledTexts, labelled_texts, stdlib_tasks
from c2r.progress import progress_bar
from c2r.sae.model import SAE
from c2r.text.packing import text_rows

KS = (1, 2, 5)
TEST_SHARE = 0.2
Accuracies = dict[str, dict[str, float]]
"""Accuracy by figure (`all`, `top_1`, …) and label."""


class Task(NamedTuple):
    """One label against an equal number of texts with other labels."""

    label: str
    train_R: Tensor
    """Indices of the training texts, half of which have the label."""
    test_R: Tensor
    positive_T: Tensor
    """Bool: which texts have the label."""


class Probe(NamedTuple):
    """A fitted probe."""

    accuracy: float
    channels: list[int]
    """Channels that it uses, best first; all of them in their order if k is None."""
    converged: bool
    """False if the logistic regression stopped at its 1000th iteration."""


class ProbeSet(NamedTuple):
    """A labelled data set and the language model's activations on it."""

    name: str
    tasks: list[Task]
    x_nD: Tensor
    text_n: Tensor
    """Index of the text that each token belongs to."""
    texts: int
    """T, the number of texts."""
    counts: dict[str, Any]
    """Number of texts per label, and labels that were left out."""


def token_means(parts: Iterable[Tensor], text_n: Tensor, texts: int) -> Tensor:
    """Mean over each text's tokens `[T, P]` of values given in consecutive batches `[·, P]`; 0 for empty texts."""
    count_T = torch.bincount(text_n, minlength=texts)
    total_TP, start = torch.empty(0), 0
    for values in parts:
        if start == 0:
            total_TP = values.new_zeros(texts, values.shape[1])
        text = text_n[start : start + len(values)]
        total_TP.index_add_(0, text.to(values.device), values / count_T[text, None].to(values.device))
        start += len(values)
    return total_TP


def one_vs_rest(labels_T: Tensor, test_T: Tensor, names: list[str], seed: int) -> list[Task]:
    """One balanced task per label, drawing evenly from the other labels; only one task if there are two labels."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for label, name in enumerate(names if len(names) > 2 else names[:1]):
        halves = []
        for half_T in (~test_T, test_T):
            positive_R = _shuffled(((labels_T == label) & half_T).nonzero().squeeze(1), generator)
            share = -(-len(positive_R) // (len(names) - 1))
            others = [((labels_T == i) & half_T).nonzero().squeeze(1) for i in range(len(names)) if i != label]
            negative_R = _shuffled(torch.cat([_shuffled(o, generator)[:share] for o in others]), generator)
            size = min(len(positive_R), len(negative_R))
            halves.append(torch.cat([positive_R[:size], negative_R[:size]]))
        tasks.append(Task(name, halves[0], halves[1], labels_T == label))
    return tasks


def probe(means_TP: Tensor, task: Task, k: int | None) -> Probe:
    """Fit the k-sparse probe (k None: all channels) on a task's training texts and score it on its test texts.

    The probe is scikit-learn's L2 logistic regression with C = 1 and at most 1000 iterations. Activations are not
    standardised, so the effect of the L2 term depends on their scale, which differs between x and latents.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    device = means_TP.device
    train_RP, test_RP = means_TP[task.train_R.to(device)], means_TP[task.test_R.to(device)]
    labels_R = task.positive_T[task.train_R].to(device)
    channels = torch.arange(means_TP.shape[1], device=device)
    if k is not None:
        difference_P = (train_RP[labels_R].mean(0) - train_RP[~labels_R].mean(0)).abs()
        channels = difference_P.sort(descending=True, stable=True).indices[:k]
    regression = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted in the result instead
        regression.fit(train_RP[:, channels].cpu().numpy(), labels_R.cpu().numpy())
    said_R = torch.from_numpy(regression.predict(test_RP[:, channels].cpu().numpy()))
    right = (said_R == task.positive_T[task.test_R]).double().mean().item()
    return Probe(right, channels.tolist(), bool(regression.n_iter_[0] < regression.max_iter))


def probe_all(means_TP: Tensor, tasks: list[Task]) -> tuple[Accuracies, dict[str, list[int]], int]:
    """Accuracies on all channels and the top k; the best channels by label; number of probes that did not converge."""
    accuracies: Accuracies = {}
    best: dict[str, list[int]] = {}
    unconverged = 0
    for task in tasks:
        for k in (None, *KS):
            fitted = probe(means_TP, task, k)
            accuracies.setdefault("all" if k is None else f"top_{k}", {})[task.label] = fitted.accuracy
            unconverged += not fitted.converged
            if k == max(KS):
                best[task.label] = fitted.channels
    return accuracies, best, unconverged


def probe_sets(bench: Bench) -> list[ProbeSet]:
    """The labelled data sets and their activations, from the cache on disk if they are there.

    Raises:
        ValueError: see `labelled_texts`; or the texts of a label contain no token.
    """
    found = (
        stdlib_tasks(bench.config.seed)
        if bench.config.probe_data is None
        else [labelled_texts(bench.config.probe_data, bench.config.seed)]
    )
    return [_read(bench, labelled) for labelled in found]


class DenseProbes:
    """Probes on x, shared by all SAEs for which the same tokens count."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, float | None], tuple[Accuracies, int]] = {}

    def on(self, data: ProbeSet, place_k: Tensor, rule: Counting) -> tuple[Accuracies, int]:
        """Accuracies on the tokens at `place_k`, and the number of probes that did not converge."""
        key = data.name, rule.max_norm
        if key not in self._known:
            parts = (data.x_nD[place] for place in place_k.split(2048))
            accuracies, _, unconverged = probe_all(token_means(parts, data.text_n[place_k], data.texts), data.tasks)
            self._known[key] = accuracies, unconverged
        return self._known[key]


@torch.no_grad()
def evaluate_probing(bench: Bench, name: str, sae: SAE, sets: Iterable[ProbeSet], dense: DenseProbes) -> Outcome:
    """SAEBench's `sparse_probing` on the data sets of `probe_sets`, averaged over labels and then over data sets.

    Only tokens that count for the SAE enter the mean of a text, also for the probes on x.
    """
    details, unstructured, counting = [], {}, {}
    rule = counting_of(sae.config)
    for data in sets:
        count_n = rule.of(data.x_nD)
        left_out = LeftOut(rule, len(count_n), int((~count_n).sum()))
        say_left_out(bench.console, f"{name}, {data.name}", left_out)
        counting[data.name] = left_out.figures
        place_k = count_n.nonzero().squeeze(1)
        codes = (sae.encode(data.x_nD[place].to(sae.W_dec.device)) for place in place_k.split(2048))
        means_TF = token_means(codes, data.text_n[place_k], data.texts)
        accuracies, latents, unconverged = probe_all(means_TF, data.tasks)
        on_x, unconverged_on_x = dense.on(data, place_k, rule)
        per_label = _named("llm", on_x) | _named("sae", accuracies)
        unstructured[f"{data.name}_results"] = per_label
        unstructured[f"{data.name}_latents"] = latents
        unstructured[f"{data.name}_texts"] = data.counts | {
            "unconverged_probes": unconverged,
            "unconverged_dense_probes": unconverged_on_x,
        }
        details.append({"dataset_name": data.name} | {key: _mean(by.values()) for key, by in per_label.items()})
    keys = [key for key in details[0] if key != "dataset_name"]
    metrics = {
        side: {key: _mean(detail[key] for detail in details) for key in keys if key.startswith(side)}
        for side in ("llm", "sae")
    }
    return Outcome(
        name,
        "sparse_probing",
        metrics,
        {
            "probe_dense": metrics["llm"]["llm_test_accuracy"],
            **{f"probe_top_{k}": metrics["sae"][f"sae_top_{k}_test_accuracy"] for k in KS},
        },
        {
            "probe_data": bench.config.probe_data,
            "dataset_names": [detail["dataset_name"] for detail in details],
            "k_values": list(KS),
            "python": platform.python_version(),
        },
        details,
        unstructured | {"counting": counting},
    )


def run_probing(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """Evaluate sparse probing of all SAEs on the same texts and splits, which the language model reads only once."""
    sets, dense = cache(lambda: probe_sets(bench)), DenseProbes()

    def one(bench: Bench, name: str, sae: SAE) -> Outcome:
        found = sets()
        with progress_bar(bench.console) as bar:
            return evaluate_probing(bench, name, sae, bar.track(found, description=f"probing {escape(name)}"), dense)

    yield from each("sparse_probing", one)(bench, saes)


def _read(bench: Bench, labelled: LabelledTexts) -> ProbeSet:
    names = list(labelled.texts)
    texts = [text for label in names for text in labelled.texts[label]]
    labels_T = torch.tensor([i for i, label in enumerate(names) for _ in labelled.texts[label]])
    settings = bench.data.model_dump(include={"context", "prepend_bos", "parse_special_tokens"})
    batches = list(text_rows(texts, bench.lm.tokenizer, **settings))
    found = bench.read(batches, "texts", f"activations of {labelled.name}")
    # The split depends only on a text's index, so that texts without tokens do not change the split of others.
    test_T = torch.cat([torch.arange(len(labelled.texts[label])) % round(1 / TEST_SHARE) == 0 for label in names])
    said_T = torch.bincount(found["row"], minlength=len(texts)) > 0
    labels_T = labels_T.masked_fill(~said_T, -1)
    for i, label in enumerate(names):
        for half_T in (test_T, ~test_T):
            if not bool(((labels_T == i) & half_T).any()):
                raise ValueError(f"{labelled.name}: the texts of label {label!r} contain no token to probe")
    counts = {"labels": {label: int((labels_T == i).sum()) for i, label in enumerate(names)}}
    tasks = one_vs_rest(labels_T, test_T, names, bench.config.seed)
    counts |= {"left_out": labelled.left_out}
    return ProbeSet(labelled.name, tasks, found["x"], found["row"], len(texts), counts)


def _named(side: str, accuracies: Accuracies) -> Accuracies:
    """Accuracies under SAEBench's names, such as `sae_test_accuracy` and `sae_top_1_test_accuracy`."""
    return {
        f"{side}_test_accuracy" if figure == "all" else f"{side}_{figure}_test_accuracy": by
        for figure, by in accuracies.items()
    }


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _shuffled(index: Tensor, generator: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=generator)]
