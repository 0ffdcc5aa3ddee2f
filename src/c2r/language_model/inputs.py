"""What inputs a language model accepts: arguments, token ids, and the maximum row length.

R rows · T positions in a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def accepts(model: Any, argument: str) -> bool:
    """Whether a model's `forward` accepts a keyword argument."""
    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def without_cache(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook that removes `use_cache`, for a model that does not accept it."""
    return args, {key: value for key, value in kwargs.items() if key != "use_cache"}


def embeddings_of(model: Any) -> int | None:
    """Number of rows of the embedding matrix, from the module or else the configuration; None if unknown."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # a custom model
        return getattr(model.config.get_text_config(), "vocab_size", None)


def layers_of(config: Any) -> int | None:
    """Number of blocks of the (text) decoder according to a model's configuration; None if it does not say."""
    text = config.get_text_config()
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)


def few_tokens(model: Any, embeddings: int | None, positions: int | None) -> tuple[Tensor, Tensor]:
    """Two rows of non-special token ids, and the same rows with a different second half."""
    sections = [model.config, model.config.get_text_config()]
    special = {
        index
        for section in sections
        for key, value in section.to_dict().items()
        if key.endswith(("token_id", "token_index"))
        for index in (value if isinstance(value, list) else [value])
    }
    plain = [index for index in range(min(embeddings or 100, 4096)) if index not in special]
    rows, length = 2, min(16, positions or 16)
    ids = [plain[(7 * number + 3) % len(plain)] for number in range(2 * rows * length)]
    ids_RT, other_RT = torch.tensor(ids).view(2, rows, length)
    other_RT[:, : length // 2] = ids_RT[:, : length // 2]
    return ids_RT, other_RT


def positions_of(model: Any) -> int | None:
    """Maximum row length according to the configuration, which has several names for it; None: no limit.

    ALiBi and scaled rotary positions allow longer rows than `max_position_embeddings`; models that count positions from
    their padding id (RoBERTa) allow fewer.
    """
    config = model.config.get_text_config()
    found = next((value for name in _POSITIONS if isinstance(value := getattr(config, name, None), int)), None)
    if found is None or getattr(config, "alibi", False):
        return None
    for rope in _scalings(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        original = rope.get("original_max_position_embeddings") or found
        found = max(found, int(rope["factor"] * original))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            found = min(found, module.num_embeddings - module.padding_idx - 1)
    return found


def _scalings(rope: Any) -> Iterator[dict[str, Any]]:
    """The sections of the rotary configuration that scale positions, at most one per type of layer."""
    if isinstance(rope, dict):
        if isinstance(rope.get("factor"), (int, float)):
            yield rope
        for inner in rope.values():
            yield from _scalings(inner)
