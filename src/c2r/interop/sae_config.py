"""Parses and validates `cfg.json` of an SAE folder: SAELens's format, including before version 6, and c2r's section.

Before version 6, SAELens wrote one flat object; since then, keys about the language model are under `metadata`. Both
are converted to the second form here, with `architecture` and `k` normalised.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
DTYPES = ("float32", "float64", "float16", "bfloat16", "fp32", "fp16", "bf16")


class _Open(BaseModel):
    """Checks the types of known keys and permits unknown keys."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Metadata(_Open):
    """Keys about the language model and its text. `c2r.eval.provenance` says how each is used."""

    model_name: str | None = None
    hook_name: str | None = None
    hook_layer: Whole | None = None
    hook_head_index: Whole | None = None
    hook_name_out: str | None = None
    hook_head_index_out: Whole | None = None
    model_class_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    prepend_bos: bool | None = None
    context_size: Annotated[Whole, Field(ge=1)] | None = None
    seqpos_slice: list[int | None] | None = None
    exclude_special_tokens: bool | list[Whole] | None = None
    exclude_bos: bool | None = None
    dataset_path: str | None = None
    dataset_trust_remote_code: bool | None = None
    sae_lens_version: str | None = None


class _Trained(_Open):
    """c2r's configuration of the SAE, as far as evaluations use it."""

    k: float | int | None = None
    target_l0: float | int | None = None
    seed: int | None = None


class _State(_Open):
    """Values found in training, as far as evaluations use them."""

    max_norm: float | int | None = None
    stopped: str | None = None


class _Ours(_Open):
    """The section that c2r adds."""

    model: dict[str, Any] | None = None
    data: dict[str, Any] = {}
    sae: _Trained = _Trained()
    train: dict[str, Any] = {}
    state: _State = _State()
    seed: int | None = None


class _File(_Open):
    """The whole file."""

    architecture: str | None = None
    d_in: Annotated[Whole, Field(ge=1)] | None = None
    d_sae: Annotated[Whole, Field(ge=1)] | None = None
    k: Annotated[Whole, Field(ge=1)] | None = None
    dtype: str | None = None
    apply_b_dec_to_input: bool | None = None
    normalize_activations: bool | str | None = None
    norm_scaling_factor: float | int | None = None
    reshape_activations: str | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    finetuning_scaling_factor: bool | None = None
    rescale_acts_by_decoder_norm: bool | None = None
    metadata: Metadata | None = None
    c2r: _Ours | None = None


_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Key in older versions → current key."""
_ARCHITECTURES = {"abstopk": "abs_topk"}
"""SAELens's name → c2r's name, where they differ."""
READ = ("standard", "topk", "jumprelu", "gated", "abs_topk")
_KNOWN = {
    "batchtopk": "a training checkpoint; c2r reads the inference form that SAELens saves as jumprelu",
    "matryoshka_batchtopk": "a training checkpoint; c2r reads the inference form that SAELens saves as jumprelu",
    "transcoder": "a transcoder, which reads one place of the model and writes another",
    "skip_transcoder": "a transcoder, which reads one place of the model and writes another",
    "jumprelu_transcoder": "a transcoder, which reads one place of the model and writes another",
    "jumprelu_skip_transcoder": "a transcoder, which reads one place of the model and writes another",
    "crosscoder": "a crosscoder, which reads several hook points",
    "temporal": "an SAE whose activations depend on earlier tokens",
    "matching_pursuit": "an SAE that encodes in several passes",
}
_NORMALISED = {
    "layer_norm": "it standardises each token, which cannot be expressed in the weights",
    "constant_norm_rescale": "it divides each token by its norm, which cannot be expressed in the weights",
    "covariance_whitening": "the whitening matrix is not in the file",
}


class Described(BaseModel):
    """Description of the weights, from `cfg.json`."""

    model_config = ConfigDict(frozen=True)

    architecture: Literal["standard", "topk", "jumprelu", "gated", "abs_topk"]
    d_in: int | None
    d_sae: int | None
    k: int | None
    subtract_b_dec: bool
    input_scale: float
    """Factor by which activations are multiplied before they are encoded."""
    rescaled: bool
    """Whether the k largest are selected by pre-activation times decoder norm."""
    finetuned: bool
    """Whether activations are multiplied by a factor per latent before decoding."""


def checked(raw: Any) -> dict[str, Any]:
    """Convert `cfg.json` to the current form: old keys renamed, keys about the model under `metadata`.

    Raises:
        ValueError: a value has the wrong type, or a key is given twice with different values; names the key.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    config: dict[str, Any] = {}
    for key, value in dict[str, Any](raw).items():
        _set(config, _RENAMED.get(key, key), value, key)
    if config.get("c2r", {}) is None:
        raise ValueError("c2r: got null; accepted is an object, or leave out the key")
    _validate(_File, config)
    metadata: dict[str, Any] = {}
    for key in Metadata.model_fields:
        if key in config:
            _set(metadata, key, config.pop(key), key)
    for key, value in dict[str, Any](config.get("metadata") or {}).items():
        _set(metadata, _RENAMED.get(key, key), value, f"metadata.{key}")
    _validate(Metadata, metadata)
    return config | {"metadata": metadata}


def described(config: dict[str, Any]) -> Described:
    """Describe the weights that belong to a configuration from `checked`.

    Raises:
        ValueError: the file uses something that c2r does not support; names the key, its value and what is accepted.
    """
    architecture, k = _activation(config)
    return Described(
        architecture=architecture,  # pyright: ignore[reportArgumentType]  (pydantic checks it)
        d_in=config.get("d_in"),
        d_sae=config.get("d_sae"),
        k=k,
        subtract_b_dec=config.get("apply_b_dec_to_input") is not False,
        input_scale=_input_scale(config),
        rescaled=bool(config.get("rescale_acts_by_decoder_norm")),
        finetuned=bool(config.get("finetuning_scaling_factor")),
    )


def _activation(config: dict[str, Any]) -> tuple[str, int | None]:
    """The actual architecture, and k. Before version 6, TopK was `standard` with `activation_fn` topk."""
    given = config.get("architecture") or "standard"
    architecture = _ARCHITECTURES.get(given, given)
    if architecture not in READ:
        why = f". This is {_KNOWN[architecture]}" if architecture in _KNOWN else ""
        raise ValueError(f"architecture: got {given!r}; accepted are {', '.join(READ)}{why}")
    function, kwargs = config.get("activation_fn"), config.get("activation_fn_kwargs") or {}
    spelt = "".join(letter for letter in (function or "").lower() if letter.isalnum())
    ranks = architecture in ("topk", "abs_topk")
    if spelt == "topk" and architecture == "standard":
        architecture = "topk"
    elif spelt not in ("", "topk" if ranks else "relu", architecture if architecture == "jumprelu" else ""):
        wanted = "topk" if ranks else "relu, or topk with architecture 'standard'"
        raise ValueError(f"activation_fn: got {function!r} with architecture {given!r}; accepted is {wanted}")
    if architecture not in ("topk", "abs_topk"):
        return architecture, None
    if kwargs.get("postact_fn") not in (None, "relu", "ReLU"):
        raise ValueError(f"activation_fn_kwargs.postact_fn: got {kwargs['postact_fn']!r}; accepted is 'relu'")
    counts = {"k": config.get("k"), "activation_fn_kwargs.k": _whole(kwargs.get("k"))}
    found = {name: value for name, value in counts.items() if value is not None}
    if not found:
        raise ValueError(f"k: missing; architecture {architecture!r} needs the number of active latents per token")
    if len(set(map(str, found.values()))) > 1:
        raise ValueError(f"k: {' and '.join(f'{name} is {value!r}' for name, value in found.items())}; they must agree")
    k, width = next(iter(found.values())), config.get("d_sae")
    if type(k) is not int or k < 1 or (width is not None and k > width):
        raise ValueError(f"k: got {k!r}; accepted are whole numbers from 1 to d_sae, {width}")
    return architecture, k


def _input_scale(config: dict[str, Any]) -> float:
    """Factor by which the file says activations are multiplied; 1 if they are not scaled."""
    if config.get("reshape_activations") not in (None, "none"):
        raise ValueError(f"reshape_activations: got {config['reshape_activations']!r}; accepted is 'none'")
    dtype = config.get("dtype")
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; accepted are {', '.join(DTYPES)}")
    # Before version 4, `normalize_activations` was true or false.
    how, factor = config.get("normalize_activations"), config.get("norm_scaling_factor")
    if how in (None, False, "none"):
        return 1.0
    if how in (True, "expected_average_only_in"):
        if factor is None:
            raise ValueError(
                f"normalize_activations: got {how!r}, which scales activations by a factor that is not in the file; "
                "accepted are 'none', or an additional key norm_scaling_factor with that factor"
            )
        if not 0 < factor < float("inf"):
            raise ValueError(f"norm_scaling_factor: got {factor!r}; accepted are numbers above 0")
        return float(factor)
    why = f" ({_NORMALISED[str(how)]})" if how in _NORMALISED else ""
    raise ValueError(f"normalize_activations: got {how!r}{why}; accepted is 'none'")


def _set(into: dict[str, Any], key: str, value: Any, said_as: str) -> None:
    """Set a key that may already be set under another name; null does not override a value."""
    if value is None and into.get(key) is not None:
        return
    if into.get(key) is not None and into[key] != value:
        raise ValueError(f"{said_as}: got {value!r}, but {key} is {into[key]!r} elsewhere in the file; they must agree")
    into[key] = value


def _validate(schema: type[BaseModel], value: dict[str, Any]) -> None:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        raise ValueError("; ".join(map(_fault, error.errors()))) from None


def _fault(fault: Any) -> str:
    """One pydantic error as a sentence: the key, what was given and what is accepted."""
    said = re.sub(r" or instance of \w+", "", fault["msg"].removeprefix("Input should be "))
    given = repr(fault["input"])
    return (
        f"{'.'.join(map(str, fault['loc']))}: got {given if len(given) < 80 else given[:77] + '…'}; accepted is {said}"
    )
