"""Checks of a model's folder or Hub repository, before and after the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from c2r.config.run import ModelConfig
from c2r.memory import check_fits


def check_folder(config: ModelConfig, path: str) -> None:
    """Reject a path that is not a model in Hugging Face format.

    Raises:
        ValueError: a single file, or an adapter, with or without the weights of its base model.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(path).is_file():
        raise ValueError(
            f"model.name: {config.name!r} is a file; accepted are 'embedded', a folder in Hugging Face format "
            "(config.json and safetensors), or a Hub id. Convert other formats, such as GGUF, with transformers"
        )
    try:
        found = find_adapter_config_file(path, revision=config.revision)
    except (OSError, ValueError):  # no such repository or no connection; loading reports which
        return
    if found is None:
        return
    try:
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise ValueError(
        f"model.name: {config.name!r} holds an adapter (adapter_config.json, made for {base!r}), which would not be "
        "applied; merge it with peft (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained("
        "folder)) and give that folder, or remove adapter_config.json to use only the base model"
    )


def check_architecture(config: ModelConfig, architecture: Any) -> None:
    """Reject a model that is not a causal language model according to its configuration.

    Raises:
        ValueError: an encoder-decoder, or an architecture without a causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = architecture.model_type
    if getattr(architecture, "is_encoder_decoder", False):
        raise ValueError(
            f"model.name: {config.name!r} ({kind}) is an encoder-decoder; accepted are causal language models "
            "(decoder-only)"
        )
    remote = "AutoModelForCausalLM" in (getattr(architecture, "auto_map", None) or {})
    if not remote and type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model.name: {config.name!r} ({kind}) is not a causal language model; accepted are those that "
            "transformers loads with AutoModelForCausalLM"
        )


def check_room(config: ModelConfig, architecture: Any, device: torch.device) -> None:
    """Reject a model whose weights alone do not fit into memory, without loading them.

    A model passes if its size is not known in advance (quantised weights, or it cannot be built on the meta device).

    Raises:
        RoomError: the weights do not fit.
    """
    from transformers import AutoModelForCausalLM

    if getattr(architecture, "quantization_config", None) is not None:
        return
    try:
        with torch.device("meta"):  # shapes without memory
            empty = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except Exception:  # custom model code may fail in any way on the meta device
        return
    size = sum(weight.numel() for weight in empty.parameters()) * getattr(torch, config.dtype).itemsize
    for place in dict.fromkeys((torch.device("cpu"), device)):  # weights pass through the CPU's memory
        check_fits(
            f"model.name: the weights of {config.name!r} as {config.dtype}", size, place,
            "lower model.dtype (bfloat16 needs half as much as float32), or use a smaller model",
        )  # fmt: skip


def check_loaded(config: ModelConfig, model: nn.Module, info: dict[str, Any]) -> None:
    """Reject a loaded model that does not match its checkpoint.

    Arguments:
        info: the loading report of transformers (`output_loading_info`).

    Raises:
        ValueError: the checkpoint lacks weights, which transformers would initialize at random, or it has weights that
            the configuration switches off, such as a bias.
    """
    missing = sorted(map(str, info["missing_keys"])) + sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ValueError(
            f"model.name: the checkpoint {config.name!r} lacks {len(missing)} of the weights of {type(model).__name__} "
            f"({_some(missing)}), which would be initialized at random; give a complete checkpoint of a causal "
            "language model"
        )
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return
    modules = dict(model.named_modules())
    off: list[str] = []
    for key in sorted(map(str, info["unexpected_keys"])):
        parent, _, name = key.rpartition(".")
        if parent in modules and name in modules[parent]._parameters:  # registered as None
            off.append(key)
    if off:
        raise ValueError(
            f"model.name: the checkpoint {config.name!r} has weights that its config.json switches off ({_some(off)}); "
            "they would be ignored, so correct config.json"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
