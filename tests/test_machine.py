"""Choice of precision from the processor's features, without timing, and the record of the choice."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from builders import known_run
from c2r import machine
from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS, BatchTopKConfig
from c2r.machine import fast_dtype, int8_pays, quick_dtype, usable_features
from c2r.training import precision
from c2r.training.precision import Precision, choose_precision, precision_lines
from c2r.training.run import Run
from c2r.training.signals import Stopped
from c2r.training.trainer import train

AVX2 = ("avx2",)
CLIENT = ("avx2", "avx_vnni")
VNNI = ("avx2", "avx512f", "avx512_vnni")
BF16 = (*VNNI, "avx512_bf16")
AMX = (*BF16, "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "dtype", "from_latents"),
    [
        ((), torch.float32, None),
        (AVX2, torch.float32, None),
        (CLIENT, torch.float32, None),
        (VNNI, torch.float32, 96),
        (BF16, torch.bfloat16, 224),
        (AMX, torch.bfloat16, None),
        (("amx_tile", "amx_int8"), torch.float32, None),  # AMX without bf16
        (("avx512f", "avx512_bf16"), torch.bfloat16, None),
    ],
)
def test_the_rule(features: tuple[str, ...], dtype: torch.dtype, from_latents: int | None) -> None:
    assert fast_dtype(features) == dtype
    assert not int8_pays(features, 100, 32)  # too many of the latents fire
    if from_latents is None:
        assert not int8_pays(features, 10**6, 1)
    else:
        assert int8_pays(features, 32 * from_latents, 32)
        assert not int8_pays(features, 32 * from_latents - 1, 32)


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({}, set(AMX)),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, set(AMX)),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {*BF16, "avx_vnni"}),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, {*VNNI, "avx_vnni"}),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, {"avx2", "avx512f"}),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"avx2"}),
        ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, set()),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, {"avx2", "avx_vnni"}),
        ({"ATEN_CPU_CAPABILITY": "default"}, set()),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, set(AMX)),
    ],
)
def test_limits_that_the_environment_sets(environment: dict[str, str], left: set[str]) -> None:
    assert set(usable_features([*AMX, "sse4_1", "fma"], environment)) == left


def test_features_are_read_from_the_first_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nmodel name\t: Some CPU: fast\nflags\t\t: fpu avx2 avx512_bf16\n\n"
        "processor\t: 1\nflags\t\t: fpu\n"
    )
    assert machine._cpu_field("flags", file) == "fpu avx2 avx512_bf16"
    assert machine._cpu_field("model name", file) == "Some CPU: fast"
    file.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n")  # ARM
    assert machine._cpu_field("flags", file) == ""
    assert machine._cpu_field("flags", tmp_path / "missing") == ""


def test_without_onednn_nothing_is_fast_but_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpu_flags", lambda: AMX)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert machine.cpu_features.__wrapped__() == ()


def on_a(monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], *, exact: bool = True) -> None:
    """Pretend that the CPU has these features, and that its int8 products are exact if `exact`."""
    for module in (machine, precision):
        monkeypatch.setattr(module, "cpu_features", lambda: features)
    monkeypatch.setattr(precision, "coarse_works", lambda: exact)


@pytest.mark.parametrize(
    ("features", "settings", "expected"),
    [
        (AMX, {}, (torch.bfloat16, False)),
        (AMX, {"selection": "int8"}, (torch.bfloat16, True)),
        (AMX, {"precision": "float32"}, (torch.float32, False)),
        (BF16, {}, (torch.bfloat16, True)),
        (BF16, {"selection": "product"}, (torch.bfloat16, False)),
        (BF16, {"precision": "bfloat16"}, (torch.bfloat16, False)),
        (BF16, {"precision": "bfloat16", "selection": "int8"}, (torch.bfloat16, True)),
        (BF16, {"batch": 2040}, (torch.bfloat16, False)),  # not a multiple of the group size
        (VNNI, {}, (torch.float32, True)),
        (CLIENT, {}, (torch.float32, False)),
        (AVX2, {}, (torch.float32, False)),
        (AVX2, {"precision": "bfloat16"}, (torch.bfloat16, False)),
    ],
)
def test_what_a_run_trains_in(
    features: tuple[str, ...], settings: dict[str, Any], expected: tuple[torch.dtype, bool], monkeypatch: Any
) -> None:
    on_a(monkeypatch, features)
    assert quick_dtype(CPU) == fast_dtype(features)
    found = TrainConfig(tokens=10**6, **settings)
    assert choose_precision(BatchTopKConfig(name="x", width=16384, k=32), found, CPU) == expected
    # No candidates for methods that do not select per batch, or with few latents.
    assert choose_precision(SECTIONS["top_k"](name="x", width=16384, k=32), found, CPU) == (expected[0], False)
    if "selection" not in settings:
        assert not choose_precision(BatchTopKConfig(name="x", width=1024, k=32), found, CPU).int8
    # The recorded values reproduce the choice on any machine that supports it.
    record = Precision(*expected).record
    on_a(monkeypatch, BF16)
    again = TrainConfig(tokens=10**6, **({"batch": 2048} | settings | record))
    assert choose_precision(BatchTopKConfig(name="x", width=16384, k=32), again, CPU) == expected


def test_no_stopwatch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at() -> float:
        raise AssertionError("a clock was read")

    on_a(monkeypatch, BF16)
    for name in ("perf_counter", "time", "monotonic", "perf_counter_ns"):
        monkeypatch.setattr(time, name, looked_at)
    assert Run(BatchTopKConfig(name="x", width=4096, k=1), TrainConfig(tokens=64, batch=32), 8).precision.int8


@pytest.mark.parametrize(
    ("settings", "device", "exact", "says"),
    [
        ({}, "cuda", True, "needs a CPU, and the device is 'cuda'"),
        ({"batch": 100}, "cpu", True, "multiple of 32, and train.batch is 100"),
        ({}, "cpu", False, "int8 products are not exact .*avx2"),
    ],
)
def test_int8_that_cannot_be_had_is_refused(
    settings: dict[str, Any], device: str, exact: bool, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a(monkeypatch, AVX2, exact=exact)
    asked = TrainConfig(tokens=10**6, selection="int8", **settings)
    for method in ("batch_top_k", "ort"):
        with pytest.raises(ValueError, match=rf"train\.selection: got 'int8', but .*{says}.*'auto' and 'product'"):
            choose_precision(SECTIONS[method](name="x", width=16, k=2), asked, torch.device(device))
    if device == "cpu":  # before the activations are opened
        config = known_run(tmp_path / "run", train=asked.model_dump() | {"device": "cpu"})
        with pytest.raises(ValueError, match=r"train\.selection"):
            train(config)


# The record


def machines_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "cfg.json").read_text())["c2r"]["machines"]


def test_what_ran_is_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a(monkeypatch, VNNI)
    console = Console(file=(tmp_path / "said").open("w"), width=200)
    folders = train(known_run(tmp_path / "run"), console=console)
    console.file.close()
    for name in ("baseline", "c2r"):
        (found,) = machines_of(folders[name])
        assert (found["precision"], found["selection"], found["from_step"]) == ("float32", "product", 0)
        assert found["features"] == list(VNNI)
        assert (found["device"], found["torch"], found["threads"]) == ("cpu", torch.__version__, 1)
    assert "encoder product in float32\n" in (tmp_path / "said").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {(line["product_bits"], line["int8"]) for line in lines} == {(32, 0)}


def test_each_part_of_a_resumed_run_is_recorded_and_keeps_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.step

    def stopping(self: Run[Any], x: torch.Tensor) -> Any:
        if self.step_number == 7 and self.config.name == "c2r":
            raise Stopped(2)
        return original(self, x)

    config = known_run(tmp_path / "run", train={"tokens": 1536, "batch": 64, "device": "cpu", "checkpoint_every": 3})
    on_a(monkeypatch, BF16)
    monkeypatch.setattr(Run, "step", stopping)
    with pytest.raises(Stopped):
        train(config)
    monkeypatch.setattr(Run, "step", original)
    on_a(monkeypatch, AVX2)
    folders = train(config)
    first, second = machines_of(folders["c2r"])
    assert (first["from_step"], first["features"]) == (0, list(BF16))
    assert (second["from_step"], second["features"]) == (6, list(AVX2))
    assert first["precision"] == second["precision"] == "bfloat16"


def test_int8_that_a_resumed_run_loses_is_reported_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    config, settings = BatchTopKConfig(name="x", width=64, k=2), TrainConfig(tokens=640, batch=32)
    state = Run(config, settings, 8).state_dict() | {"int8": True, "product": "float32"}
    lost = {}
    for exact in (True, False):
        on_a(monkeypatch, VNNI, exact=exact)
        resumed = Run(config, settings, 8)
        resumed.load_state_dict(state)
        assert resumed.precision == (torch.float32, exact)
        assert resumed.machines[-1]["selection"] == ("int8" if exact else "product")
        lost[exact] = precision_lines({"x": resumed.precision}, {"x": state})
    assert lost[True] == ["encoder product in float32, int8 candidate search"]
    assert lost[False][0] == "encoder product in float32"
    assert lost[False][1].startswith(
        "x: training began with int8 candidate search, which this machine does not support"
    )


def test_saes_of_several_precisions_are_told_apart() -> None:
    now = {
        "a": Precision(torch.bfloat16, True),
        "b": Precision(torch.bfloat16, False),
        "c": Precision(torch.bfloat16, True),
    }
    assert precision_lines(now, {}) == [
        "encoder product in bfloat16, int8 candidate search: a, c",
        "encoder product in bfloat16: b",
    ]
