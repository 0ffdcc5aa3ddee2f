"""What an SAE's `cfg.json` says of where it comes from: the language model and hook point it reads, and its text."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from c2r.config import DataConfig, ModelConfig
from c2r.data_config import text_to_evaluate

_READING = ("context", "drop_tokens", "prepend_bos")
"""Keys of `data` that say how rows are read and which tokens count, whatever the text."""


def model_of(config: dict[str, Any], name: str | None, trust_remote_code: bool = False) -> ModelConfig:
    """The model and hook point that an SAE reads, from its `cfg.json`; `name` replaces the model's name.

    Raises:
        ValueError: the file says neither in our words nor in SAELens's.
    """
    trust = {"trust_remote_code": trust_remote_code}
    if "c2r" in config and config["c2r"]["model"] is None:
        raise ValueError(
            "the SAE was trained on known features and reads no language model; "
            "--suite: accepted are recovery, stability"
        )
    if "c2r" in config:
        given = ModelConfig.model_validate(config["c2r"]["model"] | trust)
        return given if name is None else given.model_copy(update={"name": name, "revision": None})
    metadata = config.get("metadata", {})
    place = str(metadata.get("hook_name", ""))
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)", place)
    name = name or metadata.get("model_name")
    if match is None or name is None:
        raise ValueError(f"cfg.json: cannot tell the hook point from hook_name {place!r} and model_name {name!r}")
    return ModelConfig.model_validate({"name": name, "layer": int(match[1]), "hook": match[2], **trust})


def data_of(config: dict[str, Any], changes: dict[str, Any]) -> DataConfig:
    """The text that an SAE was trained on, or the standard library where its file does not say, with `changes`.

    A change of source keeps of the old one what belongs to how rows are read and which tokens count, not to the text:
    `context`, `drop_tokens`, `prepend_bos`. Of text that training did not read, nothing is held out.

    Raises:
        ValueError: the changes do not make a source.
    """
    context = config.get("metadata", {}).get("context_size") or DataConfig().context
    given = config["c2r"]["data"] if "c2r" in config else {"context": context}
    if "source" in changes:
        given = {key: given[key] for key in _READING if key in given}
    try:
        trained, data = config["c2r"]["data"] if "c2r" in config else None, given | changes
        return DataConfig.model_validate(data if "held_out" in changes else text_to_evaluate(data, trained))
    except ValidationError as error:
        raise ValueError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from None


def text_of_all(configs: dict[str, dict[str, Any]], changes: dict[str, Any]) -> DataConfig:
    """The one text on which the SAEs of these `cfg.json` are read, by name; it does not depend on their order.

    It is the text that all of them name, with `changes`. A file that names no text (another library's) takes that of
    those that do, but its length of rows and its BOS must be the same.

    Raises:
        ValueError: their files name different text, rows or tokens that count, and `changes` do not settle it.
    """
    texts = {name: data_of(config, changes) for name, config in configs.items()}
    own = [name for name in sorted(configs) if "c2r" in configs[name]]
    ruling = (own or sorted(configs))[0]
    for name in sorted(configs):
        fields = set(DataConfig.model_fields) - {"workers"}
        if own and name not in own:
            said = configs[name].get("metadata", {}).get("context_size")
            fields = {"context"} if said and "context" not in changes else set()
        differing = [
            f"{field} {getattr(texts[ruling], field)!r} and {getattr(texts[name], field)!r}"
            for field in DataConfig.model_fields
            if field in fields and getattr(texts[ruling], field) != getattr(texts[name], field)
        ]
        if not {"source", "prepend_bos"} & set(changes):
            bos = [configs[one].get("metadata", {}).get("prepend_bos") for one in (ruling, name)]
            if None not in bos and bos[0] != bos[1] and not any(line.startswith("prepend_bos") for line in differing):
                differing.append(f"prepend_bos {bos[0]!r} and {bos[1]!r}")
        if differing:
            raise ValueError(
                f"{ruling} and {name} were trained on different text: {'; '.join(differing)}. Evaluate them apart, or "
                "name the text on which both shall be read (data: source, path, context)"
            )
    return texts[ruling]
