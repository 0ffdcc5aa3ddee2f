"""Chooses the fastest precision for this machine, from the processor's features and not from timings.

Two runs of the same configuration on the same machine must give bit-identical results, but timings vary with the
machine's load. The choice therefore depends only on the processor's instruction sets:

| instruction sets | encoder product | candidates for batch-top-k |
|---|---|---|
| AMX (`amx_tile`, `amx_bf16`) | bfloat16 | from the product: with AMX it is as fast as int8 including its rounding |
| AVX-512 with `avx512_bf16`, no AMX | bfloat16 | int8 with `avx512_vnni`, from 224 latents per firing one |
| `avx512_vnni` alone | float32 | int8, from 96 latents per firing one |
| anything else (AVX2, `avx_vnni`, ARM) | float32 | from the product |

`avx_vnni` without AVX-512 does not count: oneDNN has no fast int8 product with bfloat16 output for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
"""Instruction sets that the rule uses or that help to explain its choice, as named by Linux."""
_AVX512 = frozenset(FEATURES[:5])
_AVX2 = frozenset({"avx2"})
_ONEDNN_LIMITS = {
    "SSE41": frozenset[str](),
    "AVX": frozenset[str](),
    "AVX2": _AVX2,
    "AVX2_VNNI": _AVX2 | {"avx_vnni"},
    "AVX2_VNNI_2": _AVX2 | {"avx_vnni"},
    "AVX512_CORE": _AVX2 | {"avx512f"},
    "AVX512_CORE_VNNI": _AVX512 - {"avx512_bf16"},
    "AVX512_CORE_BF16": _AVX512,
    "AVX512_CORE_FP16": _AVX512,
    "AVX10_1_512": _AVX512,
}
"""Features that oneDNN may use, by value of ONEDNN_MAX_CPU_ISA; other values impose no limit."""
_ATEN_LIMITS = {"default": frozenset[str](), "avx2": _AVX2 | {"avx_vnni"}}
"""The same for PyTorch's ATEN_CPU_CAPABILITY."""
_FROM_WITH_BF16, _FROM_WITH_FP32 = 224, 96
"""Smallest ratio of latents to active latents (F / k) at which int8 candidates are faster. Compared with a bf16
product, int8 was 7 % slower at 128 and 11 % faster at 512; compared with an fp32 product it gains more
(docs/explanation/numerics.md)."""


def pick_device(name: str) -> torch.device:
    """The torch device with this name; `auto` is the GPU if there is one, otherwise the CPU.

    Raises:
        ValueError: not a device, or not available on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"train.device: got {name!r}, which is not available; accepted are auto, cpu, cuda, cuda:0, … "
                         f"({str(error).splitlines()[0]})") from error  # fmt: skip
    return device


def fast_dtype(features: Iterable[str]) -> torch.dtype:
    """The precision in which a CPU with these features multiplies large matrices fastest: bfloat16 or float32."""
    found = set(features)
    return torch.bfloat16 if "avx512_bf16" in found or _has_amx(found) else torch.float32


def int8_pays(features: Iterable[str], width: int, k: int) -> bool:
    """Whether an int8 product should find batch-top-k's candidates when `k` of `width` latents fire.

    Candidates have to be checked, so int8 gains less when many latents fire.
    """
    found = set(features)
    if _has_amx(found) or "avx512_vnni" not in found:
        return False
    return width >= k * (_FROM_WITH_FP32 if fast_dtype(found) == torch.float32 else _FROM_WITH_BF16)


def quick_dtype(device: torch.device) -> torch.dtype:
    """The fast precision for large products on `device`; on a GPU, bfloat16 unless it would be emulated."""
    if device.type == "cpu":
        return fast_dtype(cpu_features())
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


@cache
def cpu_features() -> tuple[str, ...]:
    """Those of `FEATURES` that this CPU has and PyTorch may use; empty if unknown or without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return ()
    return usable_features(_cpu_flags(), os.environ)


def usable_features(flags: Iterable[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Those of `FEATURES` among `flags` that the environment variables of oneDNN and PyTorch permit."""
    found = set(FEATURES) & set(flags)
    of_onednn = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA", "")
    found &= _ONEDNN_LIMITS.get(of_onednn.upper(), found)
    found &= _ATEN_LIMITS.get(environment.get("ATEN_CPU_CAPABILITY", "").lower(), found)
    return tuple(name for name in FEATURES if name in found)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Properties of the machine that results may depend on, as JSON values to save with them."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "device": device.type,
        **gpu,
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "features": list(cpu_features()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _has_amx(features: set[str]) -> bool:
    return {"amx_tile", "amx_bf16"} <= features


def _cpu_flags() -> Iterable[str]:
    """The CPU's instruction sets, from Linux; on other systems from PyTorch, if it reports them."""
    flags = _cpu_field("flags").split()
    if flags:
        return flags
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name, value in capabilities.items() if value is True]


def _cpu_field(name: str, path: Path = Path("/proc/cpuinfo")) -> str:
    """A field of the first processor in /proc/cpuinfo; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")
