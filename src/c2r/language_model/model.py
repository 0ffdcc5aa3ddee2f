"""A Hugging Face causal language model, read at a hook point or run with the hook's output replaced.

R rows · T positions in a context · D width of the activations · V vocabulary · P openings · S positions of an opening.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.resources import files
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from c2r.config.hooks import Hook, HookPoint
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.identity import of_model
from c2r.language_model.centring import center
from c2r.language_model.folder import check_architecture, check_folder, check_loaded, check_room
from c2r.language_model.hook_points import Reached as _Reached
from c2r.language_model.hook_points import Replace, check_causal, find_blocks, find_part, until
from c2r.language_model.hook_points import hooked as _hooked
from c2r.language_model.inputs import accepts, embeddings_of, few_tokens, layers_of, positions_of, without_cache
from c2r.memory import RoomError
from c2r.text.tokenizer import NoTokenizer, fit_tokenizer, load_tokenizer
from c2r.text.tokenizing import beyond


class LayerError(ValueError):
    """The configured layer does not exist in the model."""


class LanguageModel:
    """A causal language model with one hook point.

    Arguments:
        model: any `AutoModelForCausalLM` whose blocks form one list. It is set to evaluation mode and run on a few
            tokens to find the blocks.
        tokenizer: its tokenizer.
        layer: index of the block, counted from 0.
        hook: `resid_pre`, `resid_post`, `mlp_out` or `attn_out` of that block. `mlp_out` and `attn_out` are what is
            added to the residual stream, so after a post-norm if the block has one (Gemma 2).

    Raises:
        ValueError: the model does not run on token ids alone, has no list of blocks, or its tokens attend to later
            ones; the layer does not exist; its block has no such part, or resid_pre + attn_out + mlp_out ≠ resid_post.
    """

    def __init__(self, model: Any, tokenizer: Any, *, layer: int, hook: Hook) -> None:
        self.model, self.tokenizer, self.layer = model.eval(), tokenizer, layer
        self.hook: Hook = hook
        self._keeps = accepts(model, "past_key_values")
        if not accepts(model, "use_cache"):  # a custom model
            model.register_forward_pre_hook(without_cache, with_kwargs=True)
        self._few, other = few_tokens(model, self.embeddings, self.positions)
        self._blocks = find_blocks(model, self._first_run, self._few, layers_of(model.config) or 1)
        check_causal(model, self._blocks, self._run, self._few, other)
        self._parts: dict[HookPoint, nn.Module] = {}
        self._block = self._module_at(HookPoint(layer, "resid_post"))
        self._module = self._module_at(HookPoint(layer, hook))

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return next(self.model.parameters()).device

    @property
    def d_in(self) -> int:
        """D, the width of the activations, which is that of the residual stream."""
        return self._blocks.width

    @cached_property
    def embeddings(self) -> int | None:
        """Number of rows of the embedding matrix: ids must be smaller. May differ from the tokenizer's size. None:
        unknown.
        """
        return embeddings_of(self.model)

    @cached_property
    def positions(self) -> int | None:
        """Maximum number of tokens in a row; None: no limit."""
        return positions_of(self.model)

    def check_data(self, data: DataConfig, name: str | None = None) -> None:
        """Check, before reading any data, that the model can process it.

        Arguments:
            name: name of the model, for errors.

        Raises:
            ValueError: rows are too long, or text for a model without a tokenizer; the message names the field.
        """
        if self.positions is not None and data.context > self.positions:
            name = name or type(self.model).__name__
            raise ValueError(f"data.context: got {data.context}; {name} reads at most {self.positions} tokens")
        if isinstance(self.tokenizer, NoTokenizer) and any(
            source.tokens_field is None for source in data.sections.values()
        ):
            self.tokenizer("")  # raises an error that says what to do

    def check_ids(self, ids_RT: Tensor) -> None:
        """Reject rows that the model cannot process.

        Raises:
            ValueError: an id exceeds the embedding matrix (with its token and place), or rows are too long.
        """
        rows, positions = self.embeddings, self.positions
        if positions is not None and ids_RT.shape[1] > positions:
            raise ValueError(f"ids_RT: got rows of {ids_RT.shape[1]} tokens; the model reads at most {positions}")
        if rows is None or not (wrong_RT := (ids_RT < 0) | (ids_RT >= rows)).any():
            return
        row, place = wrong_RT.nonzero()[0].tolist()
        index = int(ids_RT[row, place])
        token = "" if self.tokenizer is None else f" {self.tokenizer.convert_ids_to_tokens(index)!r}"
        raise ValueError(f"model.tokenizer: the token{token} in row {row}, position {place} {beyond(index, rows)}")

    @cached_property
    def identity(self) -> str:
        """Digests of the model's configuration and weights, joined by a colon; see `of_model`."""
        return of_model(self.model)

    @torch.no_grad()
    def activations(self, ids_RT: Tensor) -> Tensor:
        """Activations at the hook point, fp32 `[R, T, D]`; the forward pass ends there."""
        self.check_ids(ids_RT)
        return until(self._module, self.hook, lambda: self._run(ids_RT)).float()

    def check_points(self, points: Sequence[HookPoint]) -> None:
        """Check that the model has these hook points.

        Raises:
            ValueError: a layer does not exist, its block has no such part, or resid_pre + attn_out + mlp_out ≠
                resid_post.
        """
        for point in points:
            self._module_at(point)

    @torch.no_grad()
    def activations_at(self, ids_RT: Tensor, points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
        """Activations `[R, T, D]` at each hook point, in the model's precision, from one pass that ends at the last."""
        modules = {point: self._module_at(point) for point in points}
        self.check_ids(ids_RT)
        seen: dict[HookPoint, Tensor] = {}

        def keeping(point: HookPoint) -> Replace:
            def keep(hidden: Tensor) -> Tensor:
                seen[point] = hidden
                if len(seen) == len(points):
                    raise _Reached
                return hidden

            return keep

        with contextlib.ExitStack() as hooks:
            for point, module in modules.items():
                hooks.enter_context(_hooked(module, point.hook, keeping(point)))
            hooks.enter_context(contextlib.suppress(_Reached))
            self._run(ids_RT)
        return seen

    def _first_run(self, ids_RT: Tensor) -> Any:
        try:
            return self._run(ids_RT)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # models for other inputs can raise anything
            raise ValueError(
                f"model.name: {type(self.model).__name__} does not run on token ids alone "
                f"({type(error).__name__}: {error})"
            ) from error

    @torch.no_grad()
    def _run(self, ids_RT: Tensor) -> Any:
        return self.model(input_ids=ids_RT.to(self.device), use_cache=False)

    @torch.no_grad()
    def _module_at(self, point: HookPoint) -> nn.Module:
        """The module hooked at a hook point (cached)."""
        if point not in self._parts:
            blocks = self._blocks
            _check_layer(point.layer, len(blocks.modules))
            if point.layer not in blocks.used:
                raise ValueError(
                    f"model.layer: got {point.layer}, a block that does not run on text; choose another one"
                )
            self._parts[point] = find_part(blocks.modules[point.layer], point.hook, self._run, self._few)
        return self._parts[point]

    @torch.no_grad()
    def continuations(self, openings_PS: Tensor, ids_RT: Tensor) -> Tensor:
        """Activations fp32 `[R, T, D]` of rows that continue openings; each opening has R/P consecutive rows.

        Equals `activations` of whole rows at their last T positions, but each opening is processed only once, and its
        keys and values are reused. Models without a key-value cache process whole rows.
        """
        from transformers import DynamicCache

        copies, kept = len(ids_RT) // len(openings_PS), 0
        cache = DynamicCache(config=self.model.config) if self._keeps else None
        whole = torch.cat([openings_PS.repeat_interleave(copies, 0), ids_RT], 1)
        self.check_ids(whole)
        if cache is not None:
            row = {"input_ids": openings_PS.to(self.device), "past_key_values": cache, "use_cache": True}
            # Run to the end of the block, so that its keys are cached even if the hook comes before its attention.
            until(self._block, "resid_post", lambda: self.model(**row))
            with contextlib.suppress(ValueError):  # recurrent layers have no length
                kept = cache.get_seq_length()
        if cache is None or kept != openings_PS.shape[1]:
            return self.activations(whole)[:, openings_PS.shape[1] :]
        cache.batch_repeat_interleave(copies)
        row = {"input_ids": ids_RT.to(self.device), "past_key_values": cache, "use_cache": True}
        return until(self._module, self.hook, lambda: self.model(**row)).float()

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The decoder blocks, in order."""
        return self._blocks.modules

    def center(self, name: str) -> None:
        """Permanently subtract their mean over coordinates from the activations; see `c2r.language_model.centring`."""
        center(self.model, self.blocks, self._run, self._few, name)

    def replacing(self, replace: Replace) -> contextlib.AbstractContextManager[None]:
        """Context manager that replaces the hook's output by `replace` of it."""
        return _hooked(self._module, self.hook, replace)

    @torch.no_grad()
    def logits(self, ids_RT: Tensor, replace: Replace | None = None) -> Tensor:
        """The model's logits, fp32 `[R, T, V]`; with `replace`, the hook's output is replaced by `replace` of it."""
        if replace is None:
            return self.model(input_ids=ids_RT.to(self.device), use_cache=False).logits.float()
        with self.replacing(replace):
            return self.model(input_ids=ids_RT.to(self.device), use_cache=False).logits.float()


def load_language_model(config: ModelConfig, device: str | torch.device = "cpu") -> LanguageModel:
    """Load the model `config.name` (`embedded`, a folder, or a Hub id) with its hook point.

    Raises:
        ValueError: it cannot be loaded, is not a causal language model, is incomplete, or lacks the hook point; the
            message names the field.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, place = model_path(config.name), torch.device(device)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    check_folder(config, path)
    with _loading(config):
        architecture = AutoConfig.from_pretrained(path, **options)
    check_architecture(config, architecture)
    layers = layers_of(architecture)
    if layers is not None:  # before reading gigabytes
        _check_layer(config.layer, layers)
    check_room(config, architecture, place)
    own = None if config.tokenizer is None else model_path(config.tokenizer)
    tokenizer = load_tokenizer(config.name, path, own, architecture, **options)
    with _loading(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), output_loading_info=True, **options
        )
    model, info = loaded
    check_loaded(config, model, info)
    model = model.to(place).eval().requires_grad_(False)
    lm = LanguageModel(model, tokenizer, layer=config.layer, hook=config.hook)
    fit_tokenizer(tokenizer, lm.embeddings)
    if config.center_writing_weights:
        lm.center(config.name)
    return lm


@contextlib.contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """Convert errors raised by transformers to errors that name the field."""
    try:
        yield
    except RoomError:
        raise
    except UnpicklingError as error:  # transformers reads pytorch_model.bin with weights_only=True
        raise ValueError(
            f"model.name: {config.name!r} holds a pickle that contains code, which was not run; accepted are "
            f"safetensors, and pickles that contain only tensors ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"model.name: cannot load {config.name!r}; accepted are 'embedded', a folder in Hugging Face format, or a "
            f"Hub id: {error}"
        ) from error


def _check_layer(layer: int, blocks: int) -> None:
    if not 0 <= layer < blocks:
        raise LayerError(f"model.layer: got {layer}; the model has {blocks} blocks, 0 to {blocks - 1}")


def model_path(name: str) -> str:
    """The folder of the embedded model if `name` is `embedded`, else `name` itself."""
    return str(files("c2r") / "assets" / "embedded") if name == "embedded" else name
