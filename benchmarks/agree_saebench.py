"""c2r's core and absorption beside sae-bench 0.6.0's own code, on the same model, SAE, tokens, prompts and probes.

In an environment of its own (sae-bench wants numpy < 2 and datasets < 4; torchvision, which it names, is not used):

    python3 -m venv sbenv && sbenv/bin/pip install torch==2.13.0 "numpy<2" "datasets<4" "pyarrow<22" transformers \
        safetensors scikit-learn pydantic jaxtyping pyyaml rich einops pandas beartype tabulate matplotlib seaborn \
        plotly plotly-express openai collectibles accelerate protobuf wandb "babe==0.0.7" "nltk<4" python-dotenv \
        "simple-parsing<0.2" tenacity better_abc fancy_einsum typeguard transformers_stream_generator sentencepiece
    sbenv/bin/pip install --no-deps sae-bench==0.6.0 sae-lens==6.54.12 sae-probes==0.4.2 transformer-lens==3.9.0
    PYTHONPATH=src sbenv/bin/python benchmarks/agree_saebench.py --sae runs/demo/baseline [--freeze tests/golden]

One line of JSON a part: `core`; `ours`, sae-bench's functions on our arrays; `theirs`, ours on the arrays of a whole
run of sae-bench, and the time of both. The language model is the embedded one; sae-bench sees it through the few
methods that it calls. Where sae-bench draws prompts anew for scoring, it is given those of its probe's test words.
`--freeze` writes what `tests/test_saebench.py` checks: a small SAE, please (say 128 latents).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import sae_bench.evals.absorption.common as sb_common
import sae_bench.evals.absorption.feature_absorption as sb_absorption
import sae_bench.evals.absorption.k_sparse_probing as sb_probing
import sae_lens
import torch
from rich.console import Console
from sae_bench.evals.absorption.main import _aggregate_results_df
from sae_bench.evals.absorption.probing import LinearProbe as TheirProbe
from sae_bench.evals.core.main import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from safetensors.torch import save_file
from torch import Tensor

from c2r.config.evaluations import EvaluationConfig, FirstLetterSettings
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.absorption.concepts import Absorption, Labelled, absorption, encoded
from c2r.eval.absorption.first_letter import LETTERS, Collection, collect, words_of
from c2r.eval.absorption.probes import LinearProbe
from c2r.eval.absorption.sparse_probes import l1_probe
from c2r.eval.bench import Bench, Reading
from c2r.eval.core import evaluate_core
from c2r.eval.disk_cache import Cache
from c2r.interop.saelens import load_sae
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE
from c2r.text.packing import Rows
from c2r.text.stdlib import stdlib_documents

TEMPLATE, POSITION, MAX_K, JUMP = "{word} has the first letter:", -6, 10, 0.03
BATCHES, ROWS, CONTEXT = 4, 4, 64


class Seen:
    """The embedded model as sae-bench calls it."""

    def __init__(self, lm: LanguageModel, hook: str) -> None:
        self.lm, self.hook, self.tokenizer = lm, hook, lm.tokenizer
        self.cfg = SimpleNamespace(model_name="embedded", d_model=lm.d_in)

    def __call__(self, tokens: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Logits, and the cross-entropy of each next token."""
        return self.run_with_hooks(tokens, fwd_hooks=[])

    def run_with_hooks(self, tokens: Tensor, *, fwd_hooks: list[Any], **_: Any) -> tuple[Tensor, Tensor]:
        """The same, with the hook's output replaced."""
        replace = (lambda hidden: fwd_hooks[0][1](hidden, hook=None)) if fwd_hooks else None
        logits = self.lm.logits(tokens, replace)
        log_p = logits[:, :-1].log_softmax(-1)
        return logits, -log_p.gather(-1, tokens[:, 1:, None])[..., 0]

    def run_with_cache(self, inputs: Any, **_: Any) -> tuple[None, dict[str, Tensor]]:
        """Activations of token ids or of texts."""
        return None, {self.hook: self.lm.activations(inputs if isinstance(inputs, Tensor) else self.to_tokens(inputs))}

    def to_tokens(self, texts: str | list[str]) -> Tensor:
        """Token ids, BOS first; the texts are equally long."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.tensor([[self.tokenizer.bos_token_id, *row] for row in rows])


class Stored(Seen):
    """Activations that are there already, told apart by the prompt's last word."""

    def __init__(self, lm: LanguageModel, hook: str, words: list[str], x_nD: Tensor) -> None:
        super().__init__(lm, hook)
        self.x = dict(zip(words, x_nD, strict=True))

    def run_with_cache(self, inputs: Any, **_: Any) -> tuple[None, dict[str, Tensor]]:
        """What is stored for each text's last word, at every position."""
        words = [text.rsplit("\n", 1)[1].partition(TEMPLATE[6:])[0] for text in inputs]
        return None, {self.hook: torch.stack([self.x[word] for word in words])[:, None].expand(-1, -POSITION, -1)}


def differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, list[float]]:
    """Both figures and how far apart they are."""
    return {name: [ours[name], theirs[name], abs(ours[name] - theirs[name])] for name in theirs}


def core(lm: LanguageModel, sae: SAE, their_sae: Any, hook: str) -> tuple[Tensor, dict[str, float], dict[str, Any]]:
    """Rows of plain text tokens, without BOS, EOS and padding: there the definitions agree."""
    tokens = (t for text in stdlib_documents(held_out=True) for t in lm.tokenizer(text)["input_ids"] if t != 0)
    ids = torch.tensor(list(itertools.islice(tokens, BATCHES * ROWS * CONTEXT))).view(BATCHES, ROWS, CONTEXT)
    figures: dict[str, float] = {}
    for compute, given in (
        (get_downstream_reconstruction_metrics, {"compute_kl": True, "compute_ce_loss": True}),
        (
            get_sparsity_and_variance_metrics,
            {"compute_l2_norms": True, "compute_sparsity_metrics": True, "compute_variance_metrics": True,
             "compute_featurewise_density_statistics": True, "model_kwargs": {}},
        ),
    ):  # fmt: skip
        served = iter(ids)
        store = SimpleNamespace(get_batch_tokens=lambda _, served=served: next(served))
        with torch.no_grad():
            found = compute(their_sae, Seen(lm, hook), activation_store=store, n_batches=BATCHES,
                            eval_batch_size_prompts=ROWS, **given)  # fmt: skip
        figures |= found[0] if isinstance(found, tuple) else found
    # Its explained variance is wrong (a vector of per-dimension second moments stands for the mean), and its mean
    # squared error is divided by the batch's tokens once too often; the latter can be undone.
    figures["mse"] *= ROWS * CONTEXT
    del figures["explained_variance"]
    rows = [Rows(part, torch.ones_like(part, dtype=torch.bool)) for part in ids]
    categories = evaluate_core(lm, {"sae": sae}, rows)["sae"].core.values()
    ours = {name: value for category in categories for name, value in category.items()}
    return ids, figures, differences(ours, figures)


def their_absorption(
    model: Seen, sae: Any, part: Collection, probe: TheirProbe, l1_CF: Tensor, folder: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """sae-bench's k-sparse probes and absorption on given activations and probes: its metrics, its table of words."""
    cut = len(part.data.y_train_B)
    labels = list(zip(part.words, [*part.data.y_train_B.tolist(), *part.data.y_test_B.tolist()], strict=True))
    ranking = TheirProbe(l1_CF.shape[1], 26)
    ranking.fc.weight.data.copy_(l1_CF)
    with patch.object(sb_probing, "train_sparse_multi_probe", lambda *_, **__: ranking):
        probes = sb_probing.train_k_sparse_probes(
            sae, labels[:cut], part.data.x_train_BD, ks=list(range(1, MAX_K + 1)), precalc_sae_acts=True
        )
    raw = sb_probing.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, probes, labels[cut:], part.data.x_test_BD)
    metadata = sb_probing.sae_k_sparse_metadata(sae, probe, probes, "sae", 0)
    metrics = sb_probing.build_metrics_df(raw, metadata, max_k_value=MAX_K)
    sb_probing.add_feature_splits_to_metrics_df(metrics, max_k_value=MAX_K, f1_jump_threshold=JUMP)
    raw.to_parquet(folder / sb_probing.get_sparse_probing_raw_results_filename("sae", 0))
    found = sb_absorption.get_stats_and_likely_false_negative_tokens(metrics, "sae", 0, folder)
    calculator = sb_absorption.FeatureAbsorptionCalculator(
        model=model, icl_word_list=part.words, max_icl_examples=10, base_template=TEMPLATE, word_token_pos=POSITION,
        full_absorption_probe_cos_sim_threshold=sb_absorption.FULL_ABSORPTION_PROBE_COS_THRESHOLD,
        absorption_fraction_probe_cos_sim_threshold=sb_absorption.ABSORPTION_FRACTION_PROBE_COS_THRESHOLD,
        probe_projection_proportion_threshold=sb_absorption.ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD,
        absorption_fraction_max_absorbing_latents=sb_absorption.ABSORPTION_FRACTION_MAX_ABSORBING_LATENTS,
    )  # fmt: skip
    return metrics, sb_absorption.calculate_projection_and_cos_sims(calculator, sae, probe, 0, found)


def compared(ours: Absorption, words: list[str], metrics: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """The largest differences, and the mean over the letters that pass, ours and theirs."""
    scored = zip(*(values.tolist() for values in ours.scored), strict=True)
    mine = {words[i]: (fraction, full) for i, _, fraction, full in scored}
    given = zip(table["token"], table["absorption_fraction"], table["is_full_absorption"], strict=True)
    per_word = {word: (fraction, full) for word, fraction, full in given}
    assert mine.keys() == per_word.keys(), "other words are scored"
    rows = {row["letter"]: row for _, row in metrics.iterrows()}
    letters = {row["letter"]: row for _, row in _aggregate_results_df(table).iterrows()}
    passing = [c for c in ours.classes if rows[c.name]["f1_probe"] > 0.6]
    f1 = [abs(f - rows[c.name][f"f1_sparse_sae_{k}"]) for c in ours.classes for k, f in enumerate(c.f1_by_k, 1)]
    mean = sum(letters[c.name]["mean_absorption_fraction"] for c in passing) / len(passing)
    return {
        "words": len(mine),
        "letters_passing": [len(ours.passing), len(passing)],
        "probe_f1": max(abs(c.probe_f1 - rows[c.name]["f1_probe"]) for c in ours.classes),
        "k_sparse_f1": max(f1),
        "k_sparse_f1_that_differ": sum(d > 1e-6 for d in f1),
        "letters_of_other_split_latents": sum(c.split_latents != list(rows[c.name]["split_feats"]) for c in passing),
        "fraction_of_a_word": max(abs(mine[word][0] - per_word[word][0]) for word in mine),
        "words_of_other_full_absorption": sum(mine[word][1] != per_word[word][1] for word in mine),
        "fraction_of_a_letter": max(abs(c.fraction - letters[c.name]["mean_absorption_fraction"]) for c in passing),
        "full_of_a_letter": max(abs(c.full_rate - letters[c.name]["full_absorption_rate"]) for c in passing),
        "mean_absorption_fraction": [ours.means and ours.means["mean_absorption_fraction_score"], mean],
    }


def whole_run(lm: LanguageModel, sae: SAE, their_sae: Any, hook: str, words: list[str], folder: Path) -> dict[str, Any]:
    """sae-bench from words to aggregates, timed, and our core on the activations and probes it made."""
    model, kept, spent = Seen(lm, hook), {}, {}
    train_probes, train_l1 = sb_common.train_and_save_probes, sb_probing.train_sparse_multi_probe

    def timed_probes(*args: Any, **given: Any) -> None:
        began = time.perf_counter()
        train_probes(*args, **given)
        spent["activations and probe"] = time.perf_counter() - began

    def kept_l1(*args: Any, **given: Any) -> TheirProbe:
        kept["l1"] = train_l1(*args, **given)
        return kept["l1"]

    def same_prompts(_: Any, asked: list[str]) -> list[Any]:
        table = pd.read_csv(folder / "probes/embedded/layer_0/test_df.csv", keep_default_na=False)
        base = dict(zip(table["token"], table["prompt"], strict=True))
        return [SimpleNamespace(base=base[word], answer="", word=word) for word in asked]

    random.seed(0)
    torch.manual_seed(0)
    given: dict[str, Any] = {"model": model, "sae": their_sae, "layer": 0, "sae_name": "sae", "device": "cpu"}
    given |= {"max_k_value": MAX_K, "prompt_template": TEMPLATE, "prompt_token_pos": POSITION, "force": True}
    given |= {"probes_dir": folder / "probes"}
    began = time.perf_counter()
    with (
        patch.object(sb_common, "get_alpha_tokens", lambda _: words),
        patch.object(sb_absorption, "get_alpha_tokens", lambda _: words),
        patch.object(sb_common, "train_and_save_probes", timed_probes),
        patch.object(sb_probing, "train_sparse_multi_probe", kept_l1),
        patch.object(sb_absorption.FeatureAbsorptionCalculator, "_build_prompts", same_prompts),
    ):
        metrics = sb_probing.run_k_sparse_probing_experiment(
            **given, experiment_dir=folder / "k", precalc_k_sparse_probe_sae_acts=True, verbose=False
        )
        table = sb_absorption.run_feature_absortion_experiment(
            **given, experiment_dir=folder / "absorption", sparse_probing_experiment_dir=folder / "k"
        )
    spent["an SAE's part"] = time.perf_counter() - began - spent["activations and probe"]
    sb_probing.add_feature_splits_to_metrics_df(metrics, max_k_value=MAX_K, f1_jump_threshold=JUMP)
    made = folder / "probes/embedded/layer_0"
    with np.load(made / "data.npz") as arrays:
        data = Labelled(*(torch.from_numpy(arrays[name]) for name in ("X_train", "y_train", "X_test", "y_test")))
    probe = torch.load(made / "probe.pth", weights_only=False)
    test_words = pd.read_csv(made / "test_df.csv", keep_default_na=False)["token"].tolist()
    weights = LinearProbe(probe.weights.detach(), probe.biases.detach())
    ours = absorption(data, sae, LETTERS, probe=weights, l1_weight_CF=kept["l1"].weights.detach())
    return {"seconds": spent, **compared(ours, test_words, metrics, table)}


def freeze(
    folder: Path, sae: SAE, ids: Tensor, figures: dict[str, float], part: Collection, l1_CF: Tensor,
    settings: FirstLetterSettings, metrics: pd.DataFrame, table: pd.DataFrame,
) -> None:  # fmt: skip
    """Inputs, and what sae-bench made of them."""
    save_file(
        {
            "W_enc": sae.W_enc.detach(), "b_enc": sae.b_enc.detach(), "W_dec": sae.W_dec.detach(),
            "b_dec": sae.b_dec.detach(), "threshold": sae.threshold.detach(), "ids": ids,  # pyright: ignore[reportOptionalMemberAccess]
            "probe.weight": part.probe.weight_CD, "probe.bias": part.probe.bias_C, "l1": l1_CF.contiguous(),
        },
        folder / "saebench.safetensors",
    )  # fmt: skip
    letters = {
        row["letter"]: {
            "probe_f1": row["f1_probe"],
            "f1_by_k": [row[f"f1_sparse_sae_{k}"] for k in range(1, MAX_K + 1)],
            "split_latents": list(map(int, row["split_feats"])),
        }
        for _, row in metrics.iterrows()
    }
    scored = zip(table["token"], table["absorption_fraction"], table["is_full_absorption"], strict=True)
    words = {word: [float(fraction), bool(full)] for word, fraction, full in scored}
    content = {"oracle": "sae-bench 0.6.0", "core": figures, "prompts": settings.model_dump(), "letters": letters}
    (folder / "saebench.json").write_text(json.dumps(content | {"words": words}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, required=True, help="an SAE of the embedded model, layer 0, resid_post")
    parser.add_argument("--words", type=int, help="a sample of the words for part `ours`")
    parser.add_argument("--freeze", type=Path)
    parser.add_argument("--part", choices=("core", "ours", "theirs"), help="this alone; all by default")
    args = parser.parse_args()
    config = ModelConfig()
    lm, sae, hook = load_language_model(config), load_sae(args.sae), "blocks.0.hook_resid_post"
    _, their_sae, _ = load_and_format_sae("c2r", sae_lens.SAE.load_from_disk(args.sae), "cpu")

    ids, figures, agreement = core(lm, sae, their_sae, hook)
    if args.part in (None, "core"):
        print(json.dumps({"core": agreement}), flush=True)
    if args.part == "core":
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(
            EvaluationConfig(tokens=1),
            Cache(folder / "cache"),
            Console(quiet=True),
            lm.device,
            Reading(lm, config, DataConfig()),
        )
        words = words_of(lm.tokenizer, "spaced")
        if args.part == "theirs":
            print(json.dumps({"theirs": whole_run(lm, sae, their_sae, hook, sorted(words), folder)}), flush=True)
            return
        prompts = FirstLetterSettings(words="spaced", max_words=args.words)
        spent: dict[str, float] = {}
        for share in (1, 4):
            began = time.perf_counter()
            part = collect(bench, words, prompts.model_copy(update={"words_per_prompt": share}), 0)
            spent[f"activations and probe, {share} words a draw"] = time.perf_counter() - began
        began = time.perf_counter()
        absorption(part.data, sae, LETTERS, probe=part.probe)
        spent["an SAE's part"] = time.perf_counter() - began
        l1_CF = l1_probe(encoded(sae, part.data).train, part.data.y_train_B, len(LETTERS))
        ours = absorption(part.data, sae, LETTERS, probe=part.probe, l1_weight_CF=l1_CF)
        probe = TheirProbe(lm.d_in, 26)
        probe.fc.weight.data.copy_(part.probe.weight_CD)
        probe.fc.bias.data.copy_(part.probe.bias_C)
        test_words, test_x = part.words[len(part.data.y_train_B) :], part.data.x_test_BD
        stored = Stored(lm, hook, test_words, test_x)
        metrics, table = their_absorption(stored, their_sae, part, probe, l1_CF, folder)
        print(json.dumps({"ours": {"seconds": spent, **compared(ours, test_words, metrics, table)}}), flush=True)
        if args.part == "ours":
            return
        if args.freeze:
            freeze(args.freeze, sae, ids, figures, part, l1_CF, prompts, metrics, table)
            return
        print(json.dumps({"theirs": whole_run(lm, sae, their_sae, hook, sorted(words), folder)}), flush=True)


if __name__ == "__main__":
    main()
