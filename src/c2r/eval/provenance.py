"""What an SAE's `cfg.json` says of where it comes from: the language model and hook point it reads, and its text.

One rule: whatever the file says is heeded, or refused by name if it would change what is evaluated. `SAID` and
`OF_THE_MODEL` list what is done about each key.
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
"""Keys of `data` that say how rows are read and which tokens count, whatever the text."""


class Rule(NamedTuple):
    """What is done about one key."""

    how: Literal["heeded", "harmless", "refused"]
    why: str
    """How it is heeded, why it is harmless, or why it cannot be heeded."""
    allowed: tuple[Any, ...] = (None,)
    """refused: values that pass, because they say nothing."""


SAID: dict[str, Rule] = {
    "model_name": Rule("heeded", "model.name"),
    "hook_name": Rule("heeded", "model.layer and model.hook; see `point_of`"),
    "hook_layer": Rule("heeded", "must agree with hook_name"),
    "model_from_pretrained_kwargs": Rule("heeded", "see OF_THE_MODEL"),
    "context_size": Rule("heeded", "data.context"),
    "prepend_bos": Rule("heeded", "false: rows without BOS, data.prepend_bos; true is what rows are anyway"),
    "exclude_special_tokens": Rule("heeded", "a list: data.drop_tokens; special tokens are left out anyway"),
    "exclude_bos": Rule("harmless", "BOS is left out anyway"),
    "dataset_path": Rule("harmless", "where its text is from; the audit shows it"),
    "dataset_trust_remote_code": Rule("harmless", "code of a data set is never run"),
    "sae_lens_version": Rule("harmless", "who wrote the file"),
    "hook_head_index": Rule("refused", "it reads one attention head, and c2r whole activations"),
    "hook_head_index_out": Rule("refused", "it writes one attention head, and c2r whole activations"),
    "hook_name_out": Rule("refused", "it writes another place than it reads (a transcoder)"),
    "model_class_name": Rule(
        "refused", "c2r reads Hugging Face causal language models",
        (None, "HookedTransformer", "HookedSAETransformer", "TransformerBridge", "HookedMamba", "AutoModelForCausalLM"),
    ),
    "seqpos_slice": Rule(
        "refused", "it reads some positions of a row alone, and c2r all of them",
        (None, [], [None], [None, None], [0, None], [None, None, None], [None, None, 1], [0, None, 1]),
    ),
}  # fmt: skip
"""Keys of `metadata`. Keys that are not here describe the training of the SAE, and change nothing."""
OF_THE_MODEL: dict[str, Rule] = {
    "center_writing_weights": Rule("heeded", "model.center_writing_weights"),
    "dtype": Rule("heeded", "model.dtype"),
    "torch_dtype": Rule("heeded", "model.dtype"),
    "revision": Rule("heeded", "model.revision"),
    **dict.fromkeys(
        ("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
        Rule("harmless", "moves weights without changing what is emitted at the hook points that c2r reads"),
    ),
    **dict.fromkeys(
        ("device", "n_devices", "device_map", "move_to_device", "low_cpu_mem_usage", "use_cache", "cache_dir",
         "local_files_only", "force_download", "attn_implementation"),
        Rule("harmless", "how the model is loaded or run, not what it computes"),
    ),
    **dict.fromkeys(
        ("default_prepend_bos", "default_padding_side"),
        Rule("harmless", "how TransformerLens makes rows of text by itself, which SAELens does not use"),
    ),
    "trust_remote_code": Rule("harmless", "an SAE's own word on that is not taken"),
}  # fmt: skip
"""Keys of `metadata.model_from_pretrained_kwargs`. One that is not here is refused unless it says no."""
_PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
               "bf16": "bfloat16", "fp16": "float16", "half": "float16"}  # fmt: skip
_HOOKS = get_args(Hook)
_NAMED_ALIKE = {"gpt2-small": "gpt2"}
_OWNERS = {"pythia-": "EleutherAI/", "gemma-": "google/"}
"""TransformerLens's names of models that Hugging Face has under another."""
_OTHER_PLACES = {
    "hook_resid_mid": "the residual stream between attention and MLP, where no module of a Hugging Face model ends",
    "attn.hook_z": "attention heads before their output projection",
    "mlp.hook_post": "the MLP's hidden layer",
    "mlp.hook_pre": "the MLP's hidden layer",
}
"""Places in a block that c2r does not read, by TransformerLens's names, and what they are."""


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
        name: replaces the model's name.
        layer: replaces the block that the file names.
        hook: replaces the hook that the file names.

    Raises:
        ValueError: the file says neither in our words nor in SAELens's, or asks for something that is not read.
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
                "the SAE was trained on known features and reads no language model; "
                "suites: accepted are recovery, stability"
            )
    else:
        given = _foreign_model(config["metadata"], name, by_hand)
    if name is not None:
        given = given | {"name": name, "revision": None}
    where = "cfg.json: c2r.model" if "c2r" in config else "cfg.json: model"
    return checked_section(ModelConfig, given | by_hand | {"trust_remote_code": trust_remote_code}, where)


def data_of(config: dict[str, Any], changes: dict[str, Any]) -> DataConfig:
    """The text that an SAE was trained on, or the standard library where its file does not say, with `changes`.

    A change of source keeps how rows are made (`context`, `prepend_bos`, `drop_tokens`) and nothing else. Of
    text that training did not read, nothing is held out.

    Raises:
        ValueError: the changes do not make a source, or the file is wrong.
    """
    config = _checked(config)
    ours = _section(config, "data") if "c2r" in config else None
    if isinstance(ours, dict) and "words" in ours:  # its name until 0.1
        ours = {("spelling_fraction" if key == "words" else key): value for key, value in ours.items()}
    given = _foreign_rows(config["metadata"]) if ours is None else ours
    if "source" in changes:
        given = {key: given[key] for key in _READING if key in given}
    data = given | changes
    return checked_section(DataConfig, data if "held_out" in changes else text_to_evaluate(data, ours))


def text_of_all(configs: dict[str, dict[str, Any]], changes: dict[str, Any]) -> DataConfig:
    """The one text on which the SAEs of these `cfg.json` are read, by name; it does not depend on their order.

    It is the text that all of them name, with `changes`. A file that names no text (another library's) takes that of
    those that do, but its length of rows and its BOS must be the same.

    Raises:
        ValueError: their files name different text, rows or tokens that count, and `changes` do not settle it.
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
                f"{ruling} and {name} were trained on different text: {'; '.join(differing)}. Evaluate them apart, or "
                "name the text on which both shall be read (data: source, path, context)"
            )
    return texts[ruling]


def point_of(metadata: dict[str, Any]) -> tuple[int, str]:
    """Layer and hook of a file's `hook_name`.

    Raises:
        ValueError: it names another place, or does not say enough to tell which.
    """
    place, layer = metadata.get("hook_name"), metadata.get("hook_layer")
    accepted = f"accepted is blocks.N.hook_X, X one of {', '.join(_HOOKS)}; or give layer and hook by hand"
    if place is None:
        raise ValueError(f"cfg.json: hook_name: missing; {accepted}")
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", place.replace("{layer}", str(layer)))
    if found is None or found[2] not in _HOOKS:
        raise ValueError(f"cfg.json: cannot tell the hook point from hook_name {place!r}{_reason(place)}; {accepted}")
    if layer not in (None, int(found[1])):
        raise ValueError(f"cfg.json: hook_name is {place!r}, but hook_layer is {layer}; {accepted}")
    return int(found[1]), found[2]


def _reason(place: str) -> str:
    """Why the place that a name stands for is not read."""
    for part, what in _OTHER_PLACES.items():
        if place.endswith(part):
            return f", {what}"
    module = re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(\.\w+)*", place)
    if module is None or ".hook_" in place:
        return ""
    said = ", a module, whose input or output may be meant"
    return said + (f" (for a block's output, layer {module[1]} and hook resid_post)" if module[2] is None else "")


def _foreign_model(metadata: dict[str, Any], name: str | None, by_hand: dict[str, Any]) -> dict[str, Any]:
    """The section `model` that SAELens's metadata stands for."""
    whole = {"layer", "hook"} <= set(by_hand)
    for key, value in metadata.items():
        rule = SAID.get(key)
        if rule is None or rule.how != "refused" or value in rule.allowed:
            continue
        if key == "hook_name_out" and value == metadata.get("hook_name"):
            continue
        if key == "hook_head_index" and whole:  # whoever gives the hook point says what is read
            continue
        raise ValueError(f"cfg.json: {key} is {value!r}: {rule.why}")
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    for key, value in kwargs.items():
        if key not in OF_THE_MODEL and value not in (None, False):
            raise ValueError(
                f"cfg.json: model_from_pretrained_kwargs.{key} is {value!r}, which may change the model's activations "
                f"and is not known here; known are {', '.join(OF_THE_MODEL)}"
            )
    layer, hook = (by_hand["layer"], by_hand["hook"]) if whole else point_of(metadata)
    name = name or metadata.get("model_name")
    if name is None:
        raise ValueError("cfg.json: model_name: missing, so the language model is not known; give its name by hand")
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
    """The part of the section `data` that SAELens's metadata stands for: how rows are made."""
    given: dict[str, Any] = {"context": metadata.get("context_size") or DataConfig().context}
    left_out = metadata.get("exclude_special_tokens")
    if isinstance(left_out, list):
        given["drop_tokens"] = left_out
    if metadata.get("prepend_bos") is False:
        given["prepend_bos"] = False
    return given


def _hugging_face_name(name: str) -> str:
    """A model's name on the Hub, for the names that TransformerLens shortens."""
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
        raise ValueError(f"cfg.json: c2r.{name}: missing; c2r writes it, and a file without is damaged")
    return config["c2r"][name]
