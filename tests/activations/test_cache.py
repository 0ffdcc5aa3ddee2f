"""The cache: it returns what the model emits, even after an interrupted harvest; damage is reported and repaired."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from rich.console import Console

import c2r
from builders import CONFIGS
from c2r.activations import cache
from c2r.activations import harvest as fill
from c2r.activations.cache import CacheReader, read_manifest, read_shards
from c2r.activations.harvest import fill_cache
from c2r.activations.reader import BrokenActivations, LiveReader, live_reader
from c2r.activations.stream import ActivationStream
from c2r.config.hooks import HookPoint
from c2r.config.run import ModelConfig, RunConfig
from c2r.eval.suite import evaluate
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.training import source
from c2r.training.trainer import train
from small_runs import cached_run, files

POINTS = (HookPoint(1, "resid_post"), HookPoint(0, "mlp_out"))
QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> RunConfig:
    return cached_run(tmp_path, tiny_models["llama"], corpus)


def live(config: RunConfig) -> ActivationStream:
    reader = live_reader(config, load_language_model(config.model))
    return ActivationStream(reader, config.stream, tokens=config.train.tokens, seed=config.seed)


def cached(config: RunConfig) -> ActivationStream:
    assert config.cache is not None
    reader = CacheReader(config.cache.path, config.points, seed=config.seed)
    return ActivationStream(reader, config.stream, tokens=config.train.tokens, seed=config.seed)


def assert_same(some: list[dict[HookPoint, torch.Tensor]], others: list[dict[HookPoint, torch.Tensor]]) -> None:
    assert len(some) == len(others) > 0
    for x, y in zip(some, others, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[point], y[point]) for point in x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_and_live_streams_give_the_same_batches(
    dtype: str, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """With two hook points, outliers, several windows, shards and epochs of the text."""
    model = {"name": str(tiny_models["llama"]), "layer": 1, "dtype": dtype}
    config = cached_run(tmp_path, tiny_models["llama"], corpus, model=model, train={"tokens": 9000, "batch": 128})
    fill_cache(config, console=QUIET)
    assert config.cache is not None
    manifest = read_manifest(config.cache.path)
    assert manifest is not None
    assert manifest["tokens"] > manifest["kept"] >= 9000
    assert len(read_shards(config.cache.path)) > 5
    streams = live(config), cached(config)
    batches = [list(stream.batches(128, 9000)) for stream in streams]
    assert_same(*batches)
    assert sum(len(x[POINTS[0]]) for x in batches[0]) == 9000
    assert streams[0].scale == streams[1].scale
    assert manifest["scale"] == {point.name: value for point, value in streams[0].scale.items()}
    assert streams[0].dropped > 0


def test_resuming_a_cached_stream_at_any_batch(config: RunConfig) -> None:
    """Across shards and past the end of the cache, after which shards are read again in another order."""
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"tokens": 1500})})
    fill_cache(config, console=QUIET)
    stream, batches, states = cached(config), [], []
    for x in stream.batches(150, 2560):
        batches.append(x)
        states.append(json.loads(json.dumps(stream.state_dict())))
    for done in range(1, len(states) + 1, 3):
        resumed = cached(config)
        resumed.load_state_dict(states[done - 1])
        if done < len(batches):
            assert_same(list(resumed.batches(150, 2560 - 150 * done)), batches[done:])


def test_resuming_a_live_stream_at_any_batch(config: RunConfig) -> None:
    stream, batches, states = live(config), [], []
    for x in stream.batches(150, 2560):
        batches.append(x)
        states.append(json.loads(json.dumps(stream.state_dict())))
    for done in (1, 4, 9, 16):
        resumed = live(config)
        resumed.load_state_dict(states[done - 1])
        assert_same(list(resumed.batches(150, 2560 - 150 * done)), batches[done:])


def test_each_of_several_hook_points_is_as_it_is_alone(tiny_models: dict[str, Path]) -> None:
    points = [HookPoint(2, "attn_out"), HookPoint(0, "resid_pre"), HookPoint(1, "resid_post"), HookPoint(1, "mlp_out")]
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    for family in CONFIGS:
        lm = load_language_model(ModelConfig(name=str(tiny_models[family])))
        together = lm.activations_at(ids, points)
        assert set(together) == set(points)
        for layer, hook in points:
            alone = LanguageModel(lm.model, None, layer=layer, hook=hook).activations(ids)
            assert torch.equal(together[HookPoint(layer, hook)].float(), alone)


def test_the_cache_keeps_where_each_token_stands(config: RunConfig) -> None:
    fill_cache(config, console=QUIET)
    assert config.cache is not None
    lm = load_language_model(config.model)
    rows = [part for _, part in zip(range(3), live_reader(config, lm).rows(None), strict=False)]
    parts = CacheReader(config.cache.path, config.points).read()
    cells = {
        (int(row), int(place)): (int(token), x)
        for part in (next(parts), next(parts))
        for (row, place), token, x in zip(part.where, part.ids, part.x[POINTS[0]], strict=True)
    }
    ids, real = torch.cat([r.ids for r in rows]), torch.cat([r.real for r in rows])
    acts = lm.activations(ids)
    for row, place in real.nonzero().tolist():
        token, x = cells[row, place]
        assert token == ids[row, place]
        torch.testing.assert_close(x, acts[row, place])


# Interrupted, damaged, changed


@pytest.fixture
def whole(config: RunConfig) -> dict[str, bytes]:
    """The files of an uninterrupted harvest, which are then deleted."""
    fill_cache(config, console=QUIET)
    assert config.cache is not None
    found = files(config.cache.path)
    for path in config.cache.path.iterdir():
        path.unlink()
    return found


def test_a_harvest_that_is_killed_ends_with_the_same_files(
    config: RunConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "c2r.cli", "harvest", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "acts", time.monotonic() + 60
    while not (folder / "000000.tokens.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert files(folder) != whole
    fill_cache(config, console=QUIET)
    assert files(folder) == whole


@pytest.mark.slow
def test_a_harvest_killed_at_random_moments_ends_with_the_same_files(
    config: RunConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "c2r.cli", "harvest", str(tmp_path / "run.yaml")]
    random, killed = Random(0), 0
    while killed < 20:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        # The process is killed at a random moment after the first write, not while modules are imported.
        before = len(list((tmp_path / "acts").glob("*")))
        while process.poll() is None and len(list((tmp_path / "acts").glob("*"))) == before:
            assert time.monotonic() < deadline
        time.sleep(random.random() / 50)
        process.kill()
        killed += process.wait() != 0
        if process.returncode == 0:
            assert files(tmp_path / "acts") == whole
            for path in (tmp_path / "acts").iterdir():
                path.unlink()
    fill_cache(config, console=QUIET)
    assert files(tmp_path / "acts") == whole


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_harvest_that_breaks_anywhere_goes_on(
    after: int, config: RunConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the files of a shard, and with an incomplete last line in `shards.jsonl`."""
    original, written = cache._write, []

    def write(*args: Any) -> dict[str, Any]:
        if len(written) == 2 * after:
            raise OSError("out of power")
        written.append(args)
        return original(*args)

    monkeypatch.setattr(cache, "_write", write)
    with pytest.raises(OSError, match="out of power"):
        fill_cache(config, console=QUIET)
    monkeypatch.undo()
    assert config.cache is not None
    with (config.cache.path / "shards.jsonl").open("a") as lines:
        lines.write('{"number": 9')
    with pytest.raises(ValueError, match="is not finished; run `c2r harvest` again"):
        train(config, console=QUIET)
    fill_cache(config, console=QUIET)
    assert files(config.cache.path) == whole


def test_a_longer_harvest_is_as_one_made_at_once(config: RunConfig, whole: dict[str, bytes]) -> None:
    assert config.cache is not None
    short = config.model_copy(update={"cache": config.cache.model_copy(update={"tokens": 1000})})
    fill_cache(short, console=QUIET)
    assert files(config.cache.path) != whole
    fill_cache(config, console=QUIET)
    assert files(config.cache.path) == whole


@pytest.mark.parametrize("damage", ["gone", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["000002.blocks.0.hook_mlp_out.safetensors", "000001.tokens.safetensors"])
def test_damage_is_named_while_reading_and_mended_alone(
    damage: str, name: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(config, console=QUIET)
    assert config.cache is not None
    whole, path = files(config.cache.path), config.cache.path / name
    data = bytearray(whole[name])
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data if damage == "flipped" else data[:-7])
    says = {"gone": "it does not exist", "truncated": "bytes of", "flipped": "its checksum"}[damage]
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*{says}.*; delete it and run `c2r harvest` again"):
        list(cached(config).batches(100, 2560))
    made = []
    original = fill.write_shard
    monkeypatch.setattr(fill, "write_shard", lambda *args: made.append(args[1]) or original(*args))
    fill_cache(config, verify=damage == "flipped", console=QUIET)
    assert made == [int(name[:6])]
    assert files(config.cache.path) == whole


def test_a_cache_of_something_else_is_refused_with_the_difference(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache\.path: .*acts holds no cache; run `c2r harvest`"):
        train(config, console=QUIET)
    fill_cache(config, console=QUIET)
    other = config.model_copy(
        update={"seed": 3, "data": config.data.model_copy(update={"context": 32}), "model": config.model}
    )
    with pytest.raises(ValueError, match=r"(?s)data\.context: the cache has 16, the configuration says 32.*seed: .* 0"):
        train(other, console=QUIET)
    saes = [sae.model_copy(update={"layer": 2}) for sae in config.saes]
    with pytest.raises(ValueError, match=r"hook points: the cache has .* but not blocks\.2\.hook_resid_post"):
        fill_cache(config.model_copy(update={"saes": saes}), console=QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("all my work")
    assert config.cache is not None
    full = config.cache.model_copy(update={"path": tmp_path / "other"})
    with pytest.raises(ValueError, match="holds something other than a cache"):
        fill_cache(config.model_copy(update={"cache": full}), console=QUIET)


def test_a_hook_point_that_the_model_has_not_is_named_with_its_sae(config: RunConfig) -> None:
    saes = [sae.model_copy(update={"layer": 7}) if sae.name == "first" else sae for sae in config.saes]
    with pytest.raises(ValueError, match=r"saes\.first: model\.layer: got 7; the model has 3 blocks, 0 to 2"):
        fill_cache(config.model_copy(update={"saes": saes}), console=QUIET)


def test_a_disk_that_is_too_small_is_named_before_the_work(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fill.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"cache\.path: .* needs about 0\.0 GB more, but the disk has 0\.0 GB free"):
        fill_cache(config, console=QUIET)


def test_a_disk_that_fills_up_is_named_and_what_is_there_stays(
    config: RunConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = cache.save_file, []

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 5:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(cache, "save_file", save)
    with pytest.raises(
        ValueError, match=r"cannot write .*000001\.blocks\.1.* \([\d,]+ bytes; [\d,]+ free .*No space left"
    ):
        fill_cache(config, console=QUIET)
    assert config.cache is not None
    assert not list(config.cache.path.glob("*.partial"))
    monkeypatch.undo()
    fill_cache(config, console=QUIET)
    assert files(config.cache.path) == whole


def test_text_that_ends_makes_a_shorter_cache_and_training_says_so(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finite(*args: Any) -> LiveReader:
        reader = live_reader(*args)
        rows = reader.rows
        reader.rows = lambda start: islice(rows(start), 9)
        return reader

    monkeypatch.setattr(fill, "live_reader", finite)
    fill_cache(config)
    assert "the text ended after" in capsys.readouterr().err
    train(config)
    said = capsys.readouterr().err
    assert "it will be read repeatedly, each time in a different order" in " ".join(said.split())
    assert c2r.load(config.output / "first").config["c2r"]["state"]["tokens"] == 2560


def test_harvest_asks_for_a_cache(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"cache: no such section; add `cache: \{path"):
        fill_cache(config.model_copy(update={"cache": None}), console=QUIET)


def test_broken_activations_name_hook_and_place_and_come_with_the_part(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_language_model(config.model)
    original = lm.activations_at

    def broken(ids: torch.Tensor, points: Any) -> dict[HookPoint, torch.Tensor]:
        x = original(ids, points)
        x[POINTS[1]][2, 5, 3] = float("inf")
        return x

    monkeypatch.setattr(lm, "activations_at", broken)
    stream = ActivationStream(live_reader(config, lm), config.stream)
    with pytest.raises(BrokenActivations, match=r"blocks\.0\.hook_mlp_out .* row 2, position 5, token") as error:
        next(stream.batches(10, 10))
    tensors = error.value.tensors
    assert tensors["where"][~tensors["blocks.0.hook_mlp_out"].isfinite().all(1)].tolist() == [[2, 5]]


# The whole way


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "llama"])
def test_harvest_train_evaluate(
    family: str, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached_run(tmp_path, tiny_models[family], corpus)
    fill_cache(config, console=QUIET)
    loader = source.load_language_model
    monkeypatch.setattr(source, "load_language_model", None)  # training does not load it
    folders = train(config, console=QUIET)
    monkeypatch.setattr(source, "load_language_model", loader)
    as_live = train(cached_run(tmp_path / "live", tiny_models[family], corpus, cache=None), console=QUIET)
    for name, folder in folders.items():
        results = evaluate([folder], tokens=300, console=QUIET)
        assert results[name]["ev"] > 0.1
        one, other = (folders[name] / "sae_weights.safetensors" for folders in (folders, as_live))
        assert one.read_bytes() == other.read_bytes()
    config_of_first = c2r.load(folders["first"]).config
    assert config_of_first["metadata"]["hook_name"] == "blocks.0.hook_mlp_out"
    assert (config_of_first["c2r"]["model"]["layer"], config_of_first["c2r"]["model"]["hook"]) == (0, "mlp_out")
