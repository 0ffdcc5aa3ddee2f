"""What evaluations share: the cache on disk, its keys, and results that stand when another evaluation fails."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from builders import bench_of
from c2r.cli import main
from c2r.config.evaluations import AbsorptionEvaluation
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval import disk_cache, suite
from c2r.eval.bench import Bench
from c2r.eval.disk_cache import Cache
from c2r.eval.outcome import Outcome, each
from c2r.eval.results import write_result
from c2r.eval.suite import Suite, evaluate
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE

pytestmark = pytest.mark.usefixtures("quick_meta")


def test_the_cache_makes_once_and_repairs(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"x": torch.arange(6.0).reshape(2, 3).T}

    cache = Cache(tmp_path)
    for _ in range(2):
        assert torch.equal(cache.get("x", {"a": 1}, make)["x"], torch.arange(6.0).reshape(2, 3).T)
    assert len(made) == 1
    cache.get("x", {"a": 2}, make)
    assert len(made) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(cache.get("x", {"a": 1}, make)["x"], torch.arange(6.0).reshape(2, 3).T)
    assert len(made) == 3


def test_activations_are_collected_once(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    folders = list(tiny_run.values())
    first = evaluate(folders, suites=("splitting",), tokens=300, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("activations-*")
    written = file.stat().st_mtime_ns
    assert evaluate(folders, suites=("splitting",), tokens=300, cache=tmp_path / "cache") == first
    assert file.stat().st_mtime_ns == written
    evaluate(folders, suites=("splitting",), tokens=300, seed=1, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("activations-*"))) == 2


def test_one_failure_leaves_the_others_on_disk(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frail(bench: Bench, name: str, sae: SAE) -> Outcome:
        if name == "baseline":
            raise ValueError("broken by hand")
        return Outcome(name, "frail", {"frail": {"one": 1.0}}, {"one": 1.0})

    monkeypatch.setitem(suite.SUITES, "frail", Suite(each("frail", frail)))
    results = evaluate(list(tiny_run.values()), tmp_path / "out", suites=("frail", "splitting"), tokens=100)
    assert results.failed == ["baseline, frail: ValueError: broken by hand"]
    assert [path.name for path in results.files["c2r"]] == ["c2r_frail.json", "c2r_splitting.json"]
    assert [path.name for path in results.files["baseline"]] == ["baseline_splitting.json"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "c2r_frail.json",
        "baseline_splitting.json",
        "c2r_splitting.json",
    }
    result = json.loads((tmp_path / "out" / "c2r_frail.json").read_text())
    assert result["eval_result_metrics"] == {"frail": {"one": 1.0}}
    assert result["eval_result_unstructured"]["summary"] == {"one": 1.0}


def test_what_fails_as_a_whole_is_every_saes_failure_and_ends_no_other_suite(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
        yield Outcome("baseline", "half", {"half": {"one": 1.0}})
        raise OSError("disk or network")

    monkeypatch.setitem(suite.SUITES, "half", Suite(half))
    results = evaluate(list(tiny_run.values()), tmp_path / "out", suites=("half", "splitting"), tokens=100)
    assert results.failed == ["c2r, half: OSError: disk or network"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "baseline_half.json", "baseline_splitting.json", "c2r_splitting.json",
    }  # fmt: skip
    assert results["c2r"]["max_cos_mean"] is not None


def test_an_sae_that_fails_in_core_leaves_the_others_theirs(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = evaluate([tiny_run["c2r"]], tmp_path / "alone", suites=("core",), tokens=400)
    encode = SAE.encode
    calls = []

    def frail(self: SAE, x: torch.Tensor) -> torch.Tensor:
        calls.append(self.config["c2r"]["sae"]["name"])
        if calls.count("baseline") == 2 and calls[-1] == "baseline":
            raise RuntimeError("out of memory")
        return encode(self, x)

    monkeypatch.setattr(SAE, "encode", frail)
    results = evaluate(list(tiny_run.values()), tmp_path / "out", suites=("core",), tokens=400)
    assert results.failed == ["baseline, core: RuntimeError: out of memory"]
    assert calls.count("baseline") == 2  # in its second batch, and no more
    assert calls.count("c2r") > 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c2r_core.json"]
    assert results["c2r"] == alone["c2r"]


def test_the_command_line_tabulates_what_did_not_fail(
    tiny_run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *map(str, tiny_run.values()), "--suite", "core,recovery,splitting", "--tokens", "100"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "CE recovered" in printed.out
    assert "nearest-neighbour cosine, mean" in printed.out
    assert "c2r, recovery: ValueError: recovery needs an SAE trained on known features" in printed.err


def test_saes_of_another_model_are_refused_from_the_command_line(
    tiny_models: dict[str, Path], tiny_run: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["eval", str(tiny_run["c2r"]), *options])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "c2r: the SAE reads activations of width 16, the model's have 512" in refused("--model", "embedded")
    config = json.loads((tiny_run["c2r"] / "cfg.json").read_text())
    config["c2r"]["model"]["layer"] = 7
    (tiny_run["c2r"] / "cfg.json").write_text(json.dumps(config))
    assert "model.layer: got 7; the model has 3 blocks, 0 to 2" in refused("--model", str(tiny_models["llama"]))
    assert not (tiny_run["c2r"].parent / "evaluations").exists()


def test_settings_of_absorption_reach_it(tiny_run: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AbsorptionEvaluation] = []

    def absorption(
        bench: Bench,
        saes: dict[str, SAE],
    ) -> Iterator[Outcome]:
        seen.append(bench.config.absorption)
        return iter(())

    monkeypatch.setitem(suite.SUITES, "absorption", Suite(absorption))
    arguments = ["eval", str(tiny_run["c2r"]), "--suite", "absorption"]
    main(arguments)
    template = 'absorption.prompts.template="{word} starts with:"'
    main([*arguments, "--set", "absorption.seeds=5", template, "--set", "absorption.prompts.position=-2"])
    assert seen[0] == AbsorptionEvaluation()
    assert (seen[1].seeds, seen[1].prompts.template, seen[1].prompts.position) == (5, "{word} starts with:", -2)
    assert seen[1].prompts.examples == 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("core.seeds=5", "core: unknown key; accepted are suites, tokens"),
        (
            "absorption.seed=5",
            r"absorption\.seed: unknown key; accepted are seeds, prompts, thresholds",
        ),
        ("absorption.prompts.k=5", r"absorption\.prompts\.k: unknown key; accepted are words, template, examples"),
        ("absorption.seeds=0", r"absorption\.seeds: .*greater than or equal to 1 \(got 0\)"),
        ("absorption=5", r"absorption: .*\(got 5\)"),
        ("absorption.seeds", r"expected a\.b=c"),
    ],
)
def test_settings_that_are_refused(
    change: str, says: str, tiny_run: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["eval", str(tiny_run["c2r"]), "--suite", "absorption", "--set", change])
    assert re.search(says, capsys.readouterr().err)


# Keys of the cache


@pytest.fixture(scope="module")
def places(tiny_models: dict[str, Path]) -> dict[str, LanguageModel]:
    """The tiny Llama at three places, and with one weight of another value."""
    place = {"name": str(tiny_models["llama"]), "layer": 1}
    found = {
        "here": load_language_model(ModelConfig(**place)),
        "layer": load_language_model(ModelConfig(**place | {"layer": 0})),
        "hook": load_language_model(ModelConfig(**place, hook="mlp_out")),
        "dtype": load_language_model(ModelConfig(**place, dtype="bfloat16")),
        "weights": load_language_model(ModelConfig(**place)),
    }
    dict(found["weights"].model.named_parameters())["model.layers.0.self_attn.q_proj.weight"][1, 2] += 0.1
    return found


@pytest.mark.parametrize("change", ["layer", "hook", "dtype", "weights", "context", "seed", "text", "special"])
def test_no_entry_of_the_cache_is_taken_for_another(
    change: str, places: dict[str, LanguageModel], tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    def bench(cache: str, change: str = "") -> Bench:
        lm = places.get(change, places["here"])
        if change == "special":  # the same tokens, one of them no text any more
            lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
            lm.tokenizer.pad_token = lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("the")["input_ids"][-1])
        model = ModelConfig(
            name=str(tiny_models["llama"]), layer=lm.layer, hook=lm.hook,
            dtype="bfloat16" if change == "dtype" else "float32",
        )  # fmt: skip
        path = corpus / "b.jsonl" if change == "text" else corpus
        data = DataConfig(source="files", path=str(path), context=12 if change == "context" else 16)
        seed = 1 if change == "seed" else 0
        return bench_of(lm, model, data, 300, seed, tmp_path / cache)

    first = bench("shared").activations
    assert torch.equal(first.x_nD, bench("shared").activations.x_nD)
    found, fresh = bench("shared", change).activations, bench("fresh", change).activations
    for one, other in zip(found, fresh, strict=True):
        assert torch.equal(one, other)
    assert found.x_nD.shape != first.x_nD.shape or not torch.equal(found.x_nD, first.x_nD)
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_any_weight_makes_another_model(tiny_models: dict[str, Path]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    identities = {lm.identity}
    parameters = list(lm.model.parameters())
    for parameter in parameters:
        parameter.view(-1)[0] += 0.01
        identities.add(LanguageModel(lm.model, lm.tokenizer, layer=1, hook="resid_post").identity)
    assert len(identities) == len(parameters) + 1


def test_another_version_makes_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    assert cache.get("x", {}, lambda: {"x": torch.zeros(1)})["x"] == 0
    monkeypatch.setattr(disk_cache, "__version__", "0.0.0")
    assert cache.get("x", {}, lambda: {"x": torch.ones(1)})["x"] == 1


def test_a_figure_that_does_not_exist_is_told_from_a_true_minus_one(tmp_path: Path) -> None:
    figures = {"reconstruction_quality": {"explained_variance": float("nan"), "cossim": -1.0}, "sparsity": {"l0": 2.0}}
    path = write_result(
        tmp_path, evaluation="core", sae_name="a", sae_config={"metadata": {}}, config={}, metrics=figures
    )
    result = json.loads(path.read_text())
    assert result["eval_result_metrics"]["reconstruction_quality"] == {"explained_variance": -1, "cossim": -1.0}
    assert result["eval_result_unstructured"]["not_a_number"] == ["reconstruction_quality.explained_variance"]


def test_activations_that_are_no_numbers_end_every_evaluation_of_them(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that emits NaN at one token: no suite has a figure, and each says what is wrong."""
    emitted = LanguageModel.activations

    def with_nan(self: LanguageModel, ids_RT: torch.Tensor) -> torch.Tensor:
        x_RTD = emitted(self, ids_RT)
        x_RTD[0, 3, 2] = float("nan")
        return x_RTD

    monkeypatch.setattr(LanguageModel, "activations", with_nan)
    results = evaluate(
        [tiny_run["baseline"]],
        suites=("splitting", "audit"),
        tokens=300,
        cache=tmp_path,
        console=Console(quiet=True),
    )
    said = "\n".join(results.failed)
    for name in ("splitting", "audit"):
        assert f"baseline, {name}: ValueError: activations of the model: " in said
    assert results == {"baseline": {}}
