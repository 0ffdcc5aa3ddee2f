"""What an SAE's `cfg.json` says about its language model, hook point and training text.

The rule: every key that affects what is evaluated is either applied, or refused with its name in the error. `SAID` and
`OF_THE_MODEL` list how each key is handled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from c2r.config.faults import checked_section
from c2r.config.hooks import Hook
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig, text_to_evaluate
from c2r.interop.sae_config import checked

_READING = ("context", "drop_tokens", "parse_special_tokens", "prepend_bos")
"""Keys of `data` that define how rows are made and which tokens count, independently of the source."""


class Rule(NamedTuple):
    """How one key is handled: applied ("heeded"), ignored because it changes nothing ("harmless"), or refused."""

    how: Literal["heeded", "harmless", "refused"]
    why: str
    """How it is applied, why it changes nothing, or why it cannot be applied."""
    allowed: tuple[Any, ...] = (None,)
    """refused: values that are accepted, because they are equivalent to a missing key."""


SAID: dict[str, Rule] = {
    "model_name": Rule("heeded", "model.name"),
    "hook_name": Rule("heeded", "model.layer and model.hook; see `point_of`"),
    "hook_layer": Rule("heeded", "must agree with hook_name"),
    "model_from_pretrained_kwargs": Rule("heeded", "see OF_THE_MODEL"),
    "context_size": Rule("heeded", "data.context"),
    "prepend_bos": Rule("heeded", "false: data.prepend_bos, rows without BOS; true is the default for rows"),
    "exclude_special_tokens": Rule("heeded", "a list: data.drop_tokens; special tokens are always left out"),
    "exclude_bos": Rule("harmless", "BOS is always left out"),
    "dataset_path": Rule("harmless", "name of the training text; the audit shows it"),
    "dataset_trust_remote_code": Rule("harmless", "code of a data set is never executed"),
    "sae_lens_version": Rule("harmless", "version of the library that wrote the file"),
    "hook_head_index": Rule("refused", "the SAE reads one attention head; c2r supports only whole activations"),
    "hook_head_index_out": Rule("refused", "the SAE predicts one attention head; c2r supports only whole activations"),
    "hook_name_out": Rule("refused", "the SAE predicts another hook point than it reads (a transcoder)"),
    "model_class_name": Rule(
        "refused", "c2r supports only Hugging Face causal language models",
        (None, "HookedTransformer", "HookedSAETransformer", "TransformerBridge", "HookedMamba", "AutoModelForCausalLM"),
    ),
    "seqpos_slice": Rule(
        "refused", "the SAE reads only some positions of a row; c2r evaluates all of them",
        (None, [], [None], [None, None], [0, None], [None, None, None], [None, None, 1], [0, None, 1]),
    ),
}  # fmt: skip
"""Keys of `metadata`. Any other key describes the SAE's training and does not affect its evaluation."""
OF_THE_MODEL: dict[str, Rule] = {
    "center_writing_weights": Rule("heeded", "model.center_writing_weights"),
    "dtype": Rule("heeded", "model.dtype"),
    "torch_dtype": Rule("heeded", "model.dtype"),
    "revision": Rule("heeded", "model.revision"),
    **dict.fromkeys(
        ("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
        Rule("harmless", "rewrites weights without changing activations at the hook points that c2r reads"),
    ),
    **dict.fromkeys(
        ("device", "n_devices", "device_map", "move_to_device", "low_cpu_mem_usage", "use_cache", "cache_dir",
         "local_files_only", "force_download", "attn_implementation"),
        Rule("harmless", "affects how the model is loaded or run, not what it computes"),
    ),
    **dict.fromkeys(
        ("default_prepend_bos", "default_padding_side"),
        Rule("harmless", "affects how TransformerLens tokenizes text, which SAELens does not use"),
    ),
    "trust_remote_code": Rule("harmless", "only the user can allow this, not an SAE's file"),
}  # fmt: skip
"""Keys of `metadata.model_from_pretrained_kwargs`. Any other key is refused unless its value is null or false."""
_PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
               "bf16": "bfloat16", "fp16": "float16", "half": "float16"}  # fmt: skip
_HOOKS = get_args(Hook)
_NAMED_ALIKE = {"gpt2-small": "gpt2"}
_OWNERS = {"pythia-": "EleutherAI/", "gemma-": "google/"}
"""TransformerLens's names, and name prefixes, of models that have another name on Hugging Face."""
_OTHER_PLACES = {
    "hook_resid_mid": "the residual stream between attention and MLP, which no module of a Hugging Face model outputs",
    "attn.hook_z": "attention heads before their output projection",
    "mlp.hook_post": "the MLP's hidden layer",
    "mlp.hook_pre": "the MLP's hidden layer",
}
"""Hook points of TransformerLens that c2r does not support, and what they are."""


def model_of(
    config: dict[str, Any],
    name: str | None,
    trust_remote_code: bool = False,
    *,
    layer: int | None = None,
    hook: str | None = None,
) -> ModelConfig:
    """The model and hook point that an SAE reads, from its `cfg.json`.

    Arguments:
        name: overrides the model's name.
        layer: overrides the file's layer.
        hook: overrides the file's hook point.

    Raises:
        ValueError: the file names them neither in c2r's nor in SAELens's format, or asks for something unsupported.
    """
    config = _checked(config)
    by_hand: dict[str, Any] = {key: value for key, value in (("layer", layer), ("hook", hook)) if value is not None}
    if hook is not None and hook not in _HOOKS:
        raise ValueError(f"hook: got {hook!r}; accepted are {', '.join(_HOOKS)}")
    if layer is not None and layer < 0:
        raise ValueError(f"layer: got {layer}; accepted are whole numbers ≥ 0")
    if "c2r" in config:
        given = _section(config, "model")
        if given is None:
            raise ValueError(
                "the SAE was trained on known features, not on a language model; "
                "suites: accepted are recovery, stability"
            )
    else:
        given = _foreign_model(config["metadata"], name, by_hand)
    if name is not None:
        given = given | {"name": name, "revision": None}
    where = "cfg.json: c2r.model" if "c2r" in config else "cfg.json: model"
    return checked_section(ModelConfig, given | by_hand | {"trust_remote_code": trust_remote_code}, where)


def data_of(config: dict[str, Any], changes: dict[str, Any]) -> DataConfig:
    """The text that an SAE was trained on, with `changes`; the standard library if its file names no text.

    If the source is changed, only the settings of rows and tokens (`_READING`) are kept from the file. Nothing is held
    out from text that the SAE was not trained on.

    Raises:
        ValueError: the changed settings are invalid, or the file is.
    """
    config = _checked(config)
    ours = _section(config, "data") if "c2r" in config else None
    if isinstance(ours, dict) and "words" in ours:  # the key's name until 0.1
        ours = {("spelling_fraction" if key == "words" else key): value for key, value in ours.items()}
    given = _foreign_rows(config["metadata"]) if ours is None else ours
    if "source" in changes:
        given = {key: given[key] for key in _READING if key in given}
    data = given | changes
    return checked_section(DataConfig, data if "held_out" in changes else text_to_evaluate(data, ours))


def text_of_all(configs: dict[str, dict[str, Any]], changes: dict[str, Any]) -> DataConfig:
    """The text on which to evaluate SAEs together, given their `cfg.json` by name; independent of their order.

    This is the text that all files name, with `changes`. SAEs whose files name no text (those of other libraries) are
    evaluated on the text of the others, but their row length and BOS must agree with it.

    Raises:
        ValueError: the files disagree on text, rows or tokens that count, and `changes` do not override that.
    """
    configs = {name: _checked(config) for name, config in configs.items()}
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
                f"{ruling} and {name} were trained on different text: {'; '.join(differing)}. Evaluate them "
                "separately, or choose the text for both (data: source, path, context)"
            )
    return texts[ruling]


def point_of(metadata: dict[str, Any]) -> tuple[int, str]:
    """Layer and hook of a file's `hook_name`.

    Raises:
        ValueError: it is missing, ambiguous or not a supported hook point.
    """
    place, layer = metadata.get("hook_name"), metadata.get("hook_layer")
    accepted = f"accepted is blocks.N.hook_X, where X is one of {', '.join(_HOOKS)}; or pass layer and hook yourself"
    if place is None:
        raise ValueError(f"cfg.json: hook_name: missing; {accepted}")
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", place.replace("{layer}", str(layer)))
    if found is None or found[2] not in _HOOKS:
        raise ValueError(f"cfg.json: cannot tell the hook point from hook_name {place!r}{_reason(place)}; {accepted}")
    if layer not in (None, int(found[1])):
        raise ValueError(f"cfg.json: hook_name is {place!r}, but hook_layer is {layer}; {accepted}")
    return int(found[1]), found[2]


def _reason(place: str) -> str:
    """What an unsupported hook name refers to, as a part of an error message; empty if unknown."""
    for part, what in _OTHER_PLACES.items():
        if place.endswith(part):
            return f", {what}"
    module = re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(\.\w+)*", place)
    if module is None or ".hook_" in place:
        return ""
    said = ", which is a module: its input or its output may be meant"
    return said + (f" (the block's output is layer {module[1]}, hook resid_post)" if module[2] is None else "")


def _foreign_model(metadata: dict[str, Any], name: str | None, by_hand: dict[str, Any]) -> dict[str, Any]:
    """The section `model` that corresponds to SAELens's metadata."""
    whole = {"layer", "hook"} <= set(by_hand)
    for key, value in metadata.items():
        rule = SAID.get(key)
        if rule is None or rule.how != "refused" or value in rule.allowed:
            continue
        if key == "hook_name_out" and value == metadata.get("hook_name"):
            continue
        if key == "hook_head_index" and whole:  # the user has chosen the hook point
            continue
        raise ValueError(f"cfg.json: {key} is {value!r}: {rule.why}")
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    for key, value in kwargs.items():
        if key not in OF_THE_MODEL and value not in (None, False):
            raise ValueError(
                f"cfg.json: model_from_pretrained_kwargs.{key} is {value!r}; c2r does not know this option, and it may "
                f"change the model's activations. Known options are {', '.join(OF_THE_MODEL)}"
            )
    layer, hook = (by_hand["layer"], by_hand["hook"]) if whole else point_of(metadata)
    name = name or metadata.get("model_name")
    if name is None:
        raise ValueError("cfg.json: model_name: missing, so the language model is unknown; pass its name as model")
    given: dict[str, Any] = {"name": _hugging_face_name(name), "layer": layer, "hook": hook}
    center = kwargs.get("center_writing_weights")
    if center not in (None, True, False):
        raise ValueError(
            f"cfg.json: model_from_pretrained_kwargs.center_writing_weights is {center!r}; accepted are true and false"
        )
    precision = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if precision is not None:
        short = str(precision).removeprefix("torch.")
        if short not in _PRECISIONS:
            raise ValueError(
                f"cfg.json: the dtype of the model in model_from_pretrained_kwargs is {precision!r}; accepted are "
                f"{', '.join(_PRECISIONS)}"
            )
        given["dtype"] = _PRECISIONS[short]
    return given | {"center_writing_weights": bool(center), "revision": kwargs.get("revision")}


def _foreign_rows(metadata: dict[str, Any]) -> dict[str, Any]:
    """The part of the section `data` that corresponds to SAELens's metadata: how rows are made."""
    given: dict[str, Any] = {"context": metadata.get("context_size") or DataConfig().context}
    left_out = metadata.get("exclude_special_tokens")
    if isinstance(left_out, list):
        given["drop_tokens"] = left_out
    if metadata.get("prepend_bos") is False:
        given["prepend_bos"] = False
    return given


def _hugging_face_name(name: str) -> str:
    """A model's name on the Hugging Face Hub, from TransformerLens's short name."""
    if "/" in name or Path(name).exists():
        return name
    for start, owner in _OWNERS.items():
        if name.startswith(start):
            return owner + name
    return _NAMED_ALIKE.get(name, name)


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return checked(config)
    except ValueError as error:
        raise ValueError(f"cfg.json: {error}") from None


def _section(config: dict[str, Any], name: str) -> Any:
    """A part of c2r's own section."""
    if name not in config["c2r"]:
        raise ValueError(f"cfg.json: c2r.{name}: missing, although c2r always writes it; the file is damaged")
    return config["c2r"][name]
