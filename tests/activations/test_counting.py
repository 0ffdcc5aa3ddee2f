"""Which tokens count: the rule itself, and every evaluation held to it against counting by hand."""

import io
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from builders import bench_of as small_bench
from c2r.activations.counting import Counting, LeftOut, counting_of, counting_rules
from c2r.activations.reader import usual
from c2r.config.hooks import HookPoint
from c2r.config.run import ModelConfig, StreamConfig
from c2r.config.text import DataConfig
from c2r.eval import bench as bench_module
from c2r.eval.absorption.concepts import Labelled
from c2r.eval.absorption.first_letter import LETTERS, Collection, counted_words
from c2r.eval.absorption.probes import LinearProbe
from c2r.eval.autointerp.evaluation import make_plan
from c2r.eval.bench import Bench
from c2r.eval.probing.evaluation import DenseProbes, ProbeSet, evaluate_probing, one_vs_rest
from c2r.eval.splitting.cofiring import Cofiring
from c2r.eval.suite import evaluate
from c2r.interop.saelens import load_sae
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE
from c2r.text.packing import Rows, packed_rows

pytestmark = pytest.mark.usefixtures("quick_meta")
QUIET = Console(quiet=True)
HERE, THERE = HookPoint(0, "resid_post"), HookPoint(1, "resid_post")


# The rule


def test_the_norm_itself_still_counts_and_no_limit_leaves_out_nothing() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 5.1], [0.0, 0.0]])
    assert Counting(5.0).of(x).tolist() == [True, False, True]
    assert Counting().of(x).tolist() == [True] * 3
    assert Counting(5.0).of(x.bfloat16()).tolist() == [True, False, True]


def test_the_rule_is_read_from_the_saes_own_file() -> None:
    assert counting_of({"c2r": {"state": {"max_norm": 7.5, "median_norm": 2.5}}}) == Counting(7.5, 2.5)
    assert counting_of({"c2r": {"state": {"max_norm": None, "median_norm": 2.5}}}).max_norm is None
    for config in ({}, {"c2r": {}}, {"c2r": {"state": {"median_norm": 2.5}}}, {"metadata": {}}):
        assert counting_of(config).max_norm is None
    assert counting_rules({HERE: 2.5}, 3.0) == {HERE: Counting(7.5, 2.5)}


def test_an_outlier_at_any_one_hook_point_is_dropped_at_all() -> None:
    norms = {HERE: torch.tensor([1.0, 1, 50, 1, 1]), THERE: torch.tensor([2.0, 2, 2, 2, 70])}
    median = {HERE: 1.0, THERE: 2.0}
    expected = [True, True, False, True, False]
    for order in permutations((HERE, THERE)):
        kept = usual({point: norms[point] for point in order}, median, StreamConfig(max_norm_multiple=10))
        assert kept.tolist() == expected
    assert usual(norms, median, StreamConfig(max_norm_multiple=None)).all()


def test_what_is_said_of_the_tokens_left_out() -> None:
    said = str(LeftOut(Counting(920.0, 92.0), 40_000, 12))
    assert said.startswith("12 of 40,000 tokens (0.03%) have more than 10 × the median norm")
    assert "a norm above 920" in str(LeftOut(Counting(920.0), 40_000, 12))
    assert LeftOut(Counting(920.0, 92.0), 40_000, 12).figures == {
        "tokens_counted": 39_988, "outlier_tokens_left_out": 12, "max_norm": 920.0, "median_norm": 92.0
    }  # fmt: skip


def test_a_run_records_the_largest_norm(tmp_path: Path, tiny_models: dict[str, Path], corpus: Path) -> None:
    from builders import run_config
    from c2r.training.trainer import train

    for multiple in (1.2, None):
        stream = {"window_tokens": 256, "model_rows": 8, "max_norm_multiple": multiple}
        output = tmp_path / str(multiple)
        config = run_config(output, tiny_models["llama"], corpus, stream=stream,
                            train={"tokens": 256, "batch": 128, "device": "cpu", "precision": "float32"})  # fmt: skip
        train(config, console=QUIET)
        state = json.loads((output / "c2r" / "cfg.json").read_text())["c2r"]["state"]
        assert state["max_norm"] == (None if multiple is None else state["median_norm"] * multiple)
        assert state["look"]["median_norm"] == state["median_norm"]
        assert (state["look"]["share_dropped"] > 0) == (multiple is not None)


# Evaluations, by hand


def with_max_norm(folder: Path, max_norm: float | None) -> Path:
    config = json.loads((folder / "cfg.json").read_text())
    config["c2r"]["state"]["max_norm"] = max_norm
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


class Text:
    """The tiny run's text as the evaluation reads it, collected here."""

    def __init__(self, lm: LanguageModel, folder: Path, tokens: int) -> None:
        data = DataConfig.model_validate(json.loads((folder / "cfg.json").read_text())["c2r"]["data"])
        xs, ids, rows = [], [], []
        for number, part in enumerate(packed_rows(data, lm.tokenizer, held_out=True, rows=16)):
            xs.append(lm.activations(part.ids)[part.real])
            ids.append(part.ids[part.real])
            rows.append(16 * number + part.real.nonzero()[:, 0])
            if sum(map(len, ids)) >= tokens:
                break
        self.x, self.ids, self.rows = torch.cat(xs), torch.cat(ids), torch.cat(rows)
        self.norms = self.x.norm(dim=1)


@pytest.fixture(scope="module")
def lm(tiny_models: dict[str, Path]) -> LanguageModel:
    return load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))


@pytest.fixture
def text(lm: LanguageModel, tiny_run: dict[str, Path]) -> Text:
    """500 tokens or more, as whole batches of rows make them."""
    return Text(lm, tiny_run["c2r"], 500)


def result(folder: Path, name: str, suite: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}_{suite}.json").read_text())


def test_splitting_and_audit_leave_out_what_training_left_out(
    lm: LanguageModel, text: Text, tiny_run: dict[str, Path], tmp_path: Path
) -> None:
    limit = text.norms.quantile(0.8).item()
    folder, console = with_max_norm(tiny_run["c2r"], limit), Console(file=io.StringIO(), width=300)
    evaluate([folder], tmp_path, suites=("splitting", "audit"), tokens=500, console=console)
    count = text.norms <= limit
    outliers = int((~count).sum())
    assert 50 < outliers < 200
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert said.count(f"c2r: {outliers} of {len(count)} tokens") == 1
    counting = {"tokens_counted": int(count.sum()), "outlier_tokens_left_out": outliers}

    sae = load_sae(folder)
    with torch.no_grad():
        acts, x = sae.encode(text.x[count]), text.x[count]
        expected = Cofiring(sae.W_dec)
        expected.add(acts)
        ev = 1 - ((x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum()).item()
    splitting, audit = result(tmp_path, "c2r", "splitting"), result(tmp_path, "c2r", "audit")
    for found in (splitting, audit):
        assert counting.items() <= found["eval_result_unstructured"]["counting"].items()
    assert splitting["eval_result_metrics"]["splitting"] == pytest.approx(expected.metrics())
    assert audit["eval_result_metrics"]["audit"]["explained_variance"] == pytest.approx(ev, abs=1e-6)
    not_looked_at = " ".join(audit["eval_result_unstructured"]["not_looked_at"])
    assert f"{outliers} of {len(count)} tokens" in not_looked_at
    # What is shown is the text as it is, around tokens that count.
    places = count.nonzero().squeeze(1)
    for pairs in (splitting["eval_result_details"], audit["eval_result_unstructured"]["pairs"]):
        for pair in pairs:
            for latent, shown in zip(pair["latents"], pair["snippets"], strict=True):
                top = int(places[acts[:, latent].argmax()])
                assert shown[0]["activation"] == pytest.approx(acts[:, latent].max().item(), rel=1e-4)
                assert shown[0]["token"] == lm.tokenizer.decode([int(text.ids[top])])
                before = [i for i in range(max(0, top - 12), top) if text.rows[i] == text.rows[top]]
                assert shown[0]["before"] == lm.tokenizer.decode(text.ids[before].tolist())


def test_a_meta_sae_is_trained_on_living_latents_alone(
    lm: LanguageModel, text: Text, tiny_run: dict[str, Path], tmp_path: Path
) -> None:
    from c2r.interop.saelens import save_sae

    sae = load_sae(tiny_run["c2r"])
    with torch.no_grad():
        sae.b_enc[:9] = -1e6
    save_sae(sae, tmp_path / "part", metadata=sae.config["metadata"], c2r=sae.config["c2r"])
    evaluate([tmp_path / "part"], tmp_path, suites=("splitting",), tokens=500, console=QUIET)
    with torch.no_grad():
        alive = int((sae.encode(text.x) != 0).any(0).sum())
    assert 16 <= alive <= 23
    metrics = result(tmp_path, "part", "splitting")["eval_result_metrics"]
    assert metrics["composition"]["meta_sae_rows"] == alive
    floor = metrics["splitting"]["max_cos_random_floor"]
    assert floor == pytest.approx((2 * torch.tensor(float(alive)).log().item() / 16) ** 0.5)


def test_nothing_left_is_an_error_that_says_what_may_be_wrong(tiny_run: dict[str, Path]) -> None:
    folder = with_max_norm(tiny_run["c2r"], 1e-6)
    (failed,) = evaluate([folder], suites=("splitting",), tokens=200, console=QUIET).failed
    assert "Is this the model, hook point and scale" in failed


def bench_at(lm: LanguageModel, folder: Path, cache: Path, tokens: int) -> Bench:
    config = json.loads((folder / "cfg.json").read_text())["c2r"]
    model, data = ModelConfig.model_validate(config["model"]), DataConfig.model_validate(config["data"])
    return small_bench(lm, model, data, tokens, 0, cache)


def test_a_latent_does_not_fire_on_an_outlier_that_a_judge_reads(
    lm: LanguageModel, text: Text, tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from c2r.eval.autointerp import evaluation as autointerp
    from c2r.eval.autointerp.windows import Counts

    monkeypatch.setattr(autointerp, "COUNTS", Counts(2, 1, 1, 1, 1, radius=1))
    limit = text.norms.quantile(0.7).item()
    sae = load_sae(with_max_norm(tiny_run["c2r"], limit))
    plan = make_plan(bench_at(lm, tiny_run["c2r"], tmp_path, 500), "c2r", sae, 99)
    count = text.norms <= limit
    with torch.no_grad():
        fired = (sae.encode(text.x[count]) != 0).sum(0)
    assert plan.left_out.outliers == int((~count).sum()) > 0
    assert plan.questions
    assert {q.latent: q.fired for q in plan.questions} == {q.latent: int(fired[q.latent]) for q in plan.questions}


def test_probes_on_latents_and_on_x_see_the_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, length = 100, 6
    labels = torch.arange(texts) % 2
    x = 0.1 * torch.rand(texts * length, 4, generator=generator)
    x[:, 1] += labels.repeat_interleave(length)  # the label, on every token
    x[::length, 1] = 5 + 500 * torch.rand(texts, generator=generator)  # and an outlier at the start of every text
    test = torch.arange(texts) % 10 < 2
    data = ProbeSet(
        "planted", one_vs_rest(labels, test, ["a", "b"], 0), x, torch.arange(texts).repeat_interleave(length), texts, {}
    )
    eye = torch.eye(4)

    def accuracy(max_norm: float | None, dense: DenseProbes) -> dict[str, float | None]:
        sae = SAE(eye, torch.zeros(4), eye, torch.zeros(4), architecture="standard")
        sae.config = {"c2r": {"state": {"max_norm": max_norm}}}
        bench = small_bench(None, ModelConfig(), DataConfig(), 1, 0, Path("unused"))
        outcome = evaluate_probing(bench, "x", sae, [data], dense)
        assert outcome.unstructured["counting"]["planted"]["outlier_tokens_left_out"] == (texts if max_norm else 0)
        return outcome.summary

    shared = DenseProbes()
    without, with_outliers = accuracy(2.0, shared), accuracy(None, shared)
    assert without["probe_dense"] == without["probe_top_1"] == 1
    assert with_outliers["probe_dense"] is not None
    assert with_outliers["probe_dense"] < 0.8
    assert accuracy(2.0, shared) == without == accuracy(2.0, DenseProbes())


def test_words_whose_activations_are_outliers_are_no_words(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(26).repeat(6)
    x = torch.nn.functional.one_hot(labels, 26) + 0.01 * torch.rand(156, 26, generator=generator)
    x[[3, 150]] *= 1000
    cut = 104
    bench = small_bench(None, ModelConfig(), DataConfig(), 1, 0, tmp_path)
    whole = Collection(
        0, [f" {LETTERS[i]}{n}" for n, i in enumerate(labels.tolist())],
        Labelled(x[:cut], labels[:cut], x[cut:], labels[cut:]),
        LinearProbe(torch.zeros(26, 26), torch.zeros(26)), {"seed": 0},
    )  # fmt: skip
    same, none = counted_words(bench, whole, Counting())
    assert same is whole
    assert none.outliers == 0
    part, left_out = counted_words(bench, whole, Counting(5.0))
    assert (left_out.outliers, left_out.tokens) == (2, 156)
    assert part.words == [word for n, word in enumerate(whole.words) if n not in (3, 150)]
    assert len(part.data.x_train_BD) == cut - 1
    assert torch.equal(part.data.x_test_BD, x[[n for n in range(cut, 156) if n != 150]])
    assert part.probe.weight_CD.norm() > 0  # trained anew on the words that are left
    assert torch.equal(counted_words(bench, whole, Counting(5.0))[0].probe.weight_CD, part.probe.weight_CD)


# Order and company


@pytest.mark.parametrize("suite", ["core", "splitting", "audit", "probing"])
def test_figures_depend_neither_on_order_nor_on_company(
    suite: str, text: Text, tiny_run: dict[str, Path], tmp_path: Path
) -> None:
    third = tiny_run["c2r"].parent / "third"
    third.mkdir()
    for file in tiny_run["c2r"].iterdir():
        if file.is_file():
            (third / file.name).write_bytes(file.read_bytes())
    limits = {"baseline": None, "c2r": text.norms.quantile(0.9).item(), "third": text.norms.quantile(0.6).item()}
    folders = {name: with_max_norm(tiny_run["c2r"].parent / name, limit) for name, limit in limits.items()}
    labelled = tmp_path / "labelled.jsonl"
    lines = [{"text": f"{'the street' if i % 2 else 'my box'} {i} liquor {i * i}", "label": i % 2} for i in range(60)]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def figures(*names: str) -> dict[str, Any]:
        out = tmp_path / "_".join(names)
        probe_data = str(labelled) if suite == "probing" else None
        evaluate([folders[name] for name in names], out, suites=(suite,), tokens=300, console=QUIET,
                 probe_data=probe_data)  # fmt: skip
        (kind,) = {path.stem.removeprefix(f"{names[0]}_") for path in out.glob(f"{names[0]}_*.json")}
        found = {name: result(out, name, kind) for name in names}
        return {name: (one["eval_result_metrics"], one["eval_result_details"]) for name, one in found.items()}

    first = figures("baseline", "c2r", "third")
    assert figures("third", "c2r", "baseline") == first
    if suite == "splitting":  # pairs at one cosine are a comparison with the others
        for metrics, _ in first.values():
            for key in [key for key in metrics["splitting"] if key.startswith("matched")]:
                del metrics["splitting"][key]
    assert figures("c2r") == {"c2r": first["c2r"]}
    if suite != "core":  # which test_core holds to the rule
        assert first["third"][0] != first["c2r"][0]  # the same weights, another rule


# Text that was not trained on


def test_evaluations_read_the_text_that_is_held_out(
    lm: LanguageModel, tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {True: "walk home slowly ", False: "Pack my box "}

    def rows(data: DataConfig, tokenizer: Any, *, held_out: bool = False, **_: Any) -> Any:
        ids = tokenizer(texts[held_out] * 400, add_special_tokens=False)["input_ids"]
        ids_RT = torch.tensor(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
        for part in ids_RT.split(8):
            yield Rows(part, torch.ones_like(part, dtype=torch.bool))

    monkeypatch.setattr(bench_module, "packed_rows", rows)
    evaluate([tiny_run["c2r"]], tmp_path, suites=("splitting", "audit"), tokens=400, console=QUIET)
    shown = [
        snippet["before"] + snippet["token"] + snippet["after"]
        for pairs in (
            result(tmp_path, "c2r", "splitting")["eval_result_details"],
            result(tmp_path, "c2r", "audit")["eval_result_unstructured"]["pairs"],
        )
        for pair in pairs
        for snippets in pair["snippets"]
        for snippet in snippets
    ]
    bench = bench_at(lm, tiny_run["c2r"], tmp_path / "cache", 400)
    shown.append(lm.tokenizer.decode(torch.cat([part.ids for part in bench.rows()]).flatten().tolist()))
    shown.append(lm.tokenizer.decode(bench.activations.ids_n.tolist()))  # which autointerp reads
    assert len(shown) > 10
    assert all(words in texts[True] * 400 for words in shown)


def test_recovery_reads_activations_that_training_never_served(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from c2r.config.load import load_config
    from c2r.eval.recovery import Recovery
    from c2r.known_features.presets import known_features
    from c2r.known_features.stream import KNOWN, SyntheticStream

    seen: list[Tensor] = []
    add = Recovery.add

    def spy(self: Recovery, sample: Any) -> None:
        seen.append(sample.x_BD[(sample.z_BG > 0).sum(1) >= 3])  # tokens of few features are alike by chance
        add(self, sample)

    monkeypatch.setattr(Recovery, "add", spy)
    evaluate([whole / "c2r"], whole.parent / "out", suites=("recovery",), tokens=1500, console=QUIET)
    config = load_config(whole / "run.yaml")
    stream = SyntheticStream(known_features(config.data), seed=config.seed)  # pyright: ignore[reportArgumentType]
    served = torch.cat([batch[KNOWN] for batch in stream.batches(512, 20_000)]) * stream.scale[KNOWN]
    fresh = torch.cat(seen)
    assert len(fresh) > 50
    nearest = torch.cdist(fresh, served, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert nearest.min() > 1e-4


def test_what_is_no_number_is_no_outlier() -> None:
    """Left out as outliers, NaN and infinity would leave the figures of the rest, and nobody would know."""
    norms_n = torch.tensor([1.0, float("nan"), 20.0, float("inf")])
    assert Counting(10.0).counts(norms_n).tolist() == [True, True, False, True]
