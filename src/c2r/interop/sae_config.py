"""What `cfg.json` of an SAE folder says, checked once: SAELens's, also of versions before 6, and c2r's own section.

Before version 6 SAELens wrote one flat object; since then, what concerns the language model stands under `metadata`.
Both become the second form here, with `architecture` and `k` as they are meant. F latents · D width of the activations.
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
    """Keys that are known have their type; others pass."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Metadata(_Open):
    """What concerns the language model and its text. `c2r.eval.provenance` has what is done about each key."""

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
    """c2r's section of one SAE, as far as an evaluation reads it."""

    k: float | int | None = None
    target_l0: float | int | None = None
    seed: int | None = None


class _State(_Open):
    """Numbers found in training, as far as an evaluation reads them."""

    max_norm: float | int | None = None
    stopped: str | None = None


class _Ours(_Open):
    """What c2r adds."""

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
"""Key of an older version → key of today."""
_ARCHITECTURES = {"abstopk": "abs_topk"}
"""SAELens's name → ours, where they differ."""
READ = ("standard", "topk", "jumprelu", "gated", "abs_topk")
_KNOWN = {
    "batchtopk": "a checkpoint of training; SAELens's inference form of it, which it saves as jumprelu, is read",
    "matryoshka_batchtopk": "a checkpoint of training; SAELens's inference form of it, saved as jumprelu, is read",
    "transcoder": "a transcoder, which reads one place of the model and writes another",
    "skip_transcoder": "a transcoder, which reads one place of the model and writes another",
    "jumprelu_transcoder": "a transcoder, which reads one place of the model and writes another",
    "jumprelu_skip_transcoder": "a transcoder, which reads one place of the model and writes another",
    "crosscoder": "a crosscoder, which reads several places of the model",
    "temporal": "an SAE whose activations depend on earlier tokens",
    "matching_pursuit": "an SAE that encodes in several passes",
}
_NORMALISED = {
    "layer_norm": "it subtracts each token's mean and divides by its standard deviation, which no weights can hold",
    "constant_norm_rescale": "it divides each token by its norm, which no weights can hold",
    "covariance_whitening": "the matrix that whitens is not in the file",
}


class Described(BaseModel):
    """What the weights of a file are, as its `cfg.json` has it."""

    model_config = ConfigDict(frozen=True)

    architecture: Literal["standard", "topk", "jumprelu", "gated", "abs_topk"]
    d_in: int | None
    d_sae: int | None
    k: int | None
    subtract_b_dec: bool
    input_scale: float
    """What activations are multiplied by before they are encoded."""
    rescaled: bool
    """Whether the k largest are chosen by pre-activation times decoder norm."""
    finetuned: bool
    """Whether a factor per latent stands between activations and decoder."""


def checked(raw: Any) -> dict[str, Any]:
    """`cfg.json` in today's form: older keys renamed, what concerns the model under `metadata`.

    Raises:
        ValueError: a value of the wrong type, or a key that is given twice with different values; names the key.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    config: dict[str, Any] = {}
    for key, value in dict[str, Any](raw).items():
        _set(config, _RENAMED.get(key, key), value, key)
    if config.get("c2r", {}) is None:
        raise ValueError("c2r: got null; accepted is an object, or no such key")
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
    """What the weights beside a `checked` configuration are.

    Raises:
        ValueError: the file asks for something that is not read; names the key, its value and what is accepted.
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
    """The architecture as it is meant, and k: before version 6, TopK was `standard` with an activation function."""
    given = config.get("architecture") or "standard"
    architecture = _ARCHITECTURES.get(given, given)
    if architecture not in READ:
        why = f". This is {_KNOWN[architecture]}" if architecture in _KNOWN else ""
        raise ValueError(f"architecture is {given!r}; read are {', '.join(READ)}{why}")
    function, kwargs = config.get("activation_fn"), config.get("activation_fn_kwargs") or {}
    spelt = "".join(letter for letter in (function or "").lower() if letter.isalnum())
    ranks = architecture in ("topk", "abs_topk")
    if spelt == "topk" and architecture == "standard":
        architecture = "topk"
    elif spelt not in ("", "topk" if ranks else "relu", architecture if architecture == "jumprelu" else ""):
        wanted = "topk" if ranks else "relu, or topk in architecture 'standard'"
        raise ValueError(f"activation_fn is {function!r} in architecture {given!r}; read is {wanted}")
    if architecture not in ("topk", "abs_topk"):
        return architecture, None
    if kwargs.get("postact_fn") not in (None, "relu", "ReLU"):
        raise ValueError(f"activation_fn_kwargs.postact_fn is {kwargs['postact_fn']!r}; read is 'relu'")
    counts = {"k": config.get("k"), "activation_fn_kwargs.k": _whole(kwargs.get("k"))}
    found = {name: value for name, value in counts.items() if value is not None}
    if not found:
        raise ValueError(f"k: missing; architecture {architecture!r} needs the number of active latents per token")
    if len(set(map(str, found.values()))) > 1:
        raise ValueError(f"k: {' and '.join(f'{name} is {value!r}' for name, value in found.items())}; give one")
    k, width = next(iter(found.values())), config.get("d_sae")
    if type(k) is not int or k < 1 or (width is not None and k > width):
        raise ValueError(f"k: got {k!r}; accepted are whole numbers from 1 to d_sae, {width}")
    return architecture, k


def _input_scale(config: dict[str, Any]) -> float:
    """What activations are multiplied by, where the file states it; 1 where they are taken as they are."""
    if config.get("reshape_activations") not in (None, "none"):
        raise ValueError(f"reshape_activations is {config['reshape_activations']!r}; only 'none' is read")
    dtype = config.get("dtype")
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; read are {', '.join(DTYPES)}")
    # Before version 4 it was true or false.
    how, factor = config.get("normalize_activations"), config.get("norm_scaling_factor")
    if how in (None, False, "none"):
        return 1.0
    if how in (True, "expected_average_only_in"):
        if factor is None:
            raise ValueError(
                f"normalize_activations is {how!r}: activations are scaled to an average norm, and the file does not "
                "say by what; read are 'none', or a norm_scaling_factor beside it (what activations are multiplied by)"
            )
        if not 0 < factor < float("inf"):
            raise ValueError(f"norm_scaling_factor is {factor!r}; accepted are numbers above 0")
        return float(factor)
    why = f": {_NORMALISED[str(how)]}" if how in _NORMALISED else ""
    raise ValueError(f"normalize_activations is {how!r}{why}; only 'none' is read")


def _set(into: dict[str, Any], key: str, value: Any, said_as: str) -> None:
    """Set a key that may be there under another name already; null says nothing."""
    if value is None and into.get(key) is not None:
        return
    if into.get(key) is not None and into[key] != value:
        raise ValueError(f"{said_as} is {value!r}, but {key} is {into[key]!r} elsewhere in the file")
    into[key] = value


def _validate(schema: type[BaseModel], value: dict[str, Any]) -> None:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        raise ValueError("; ".join(map(_fault, error.errors()))) from None


def _fault(fault: Any) -> str:
    """One fault of pydantic's, as key, what is accepted and what was given."""
    said = re.sub(r" or instance of \w+", "", fault["msg"].removeprefix("Input should be "))
    given = repr(fault["input"])
    return (
        f"{'.'.join(map(str, fault['loc']))}: got {given if len(given) < 80 else given[:77] + '…'}; accepted is {said}"
    )
