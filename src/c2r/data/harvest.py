"""A Hugging Face causal language model, stopped at a hook point to give activations, or run on from it.

R rows · T positions in a context · D width of the activations · V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.resources import files
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from c2r.config import Hook, HookPoint, ModelConfig
from c2r.data.memory import RoomError, check_fits

Replace = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """Ends a forward pass at the hook; carries nothing, since the hook keeps what it saw."""


class LayerError(ValueError):
    """A layer that the model does not have."""


class LanguageModel:
    """A causal language model with one hook point.

    Arguments:
        model: any `AutoModelForCausalLM` whose blocks stand in one list.
        tokenizer: its tokenizer.
        layer: block, counted from 0.
        hook: `resid_pre`, `resid_post`, `mlp_out` or `attn_out` of that block. `mlp_out` and `attn_out` are what is
            added to the residual stream, so behind a post-norm where the block has one (Gemma 2).

    Raises:
        ValueError: no such layer, or a block without such a part.
    """

    def __init__(self, model: Any, tokenizer: Any, *, layer: int, hook: Hook) -> None:
        self.model, self.tokenizer, self.layer = model, tokenizer, layer
        self.hook: Hook = hook
        blocks = _blocks(model)
        _check_layer(layer, len(blocks))
        self._block = blocks[layer]
        self._module = _hooked_module(self._block, hook)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def d_in(self) -> int:
        """D: what the hook emits is as wide as the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @cached_property
    def identity(self) -> str:
        """Tells models apart that share a name: their configuration, and the sum of each of their weights."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, weight in self.model.named_parameters():  # every one: a merged adapter may change a few of them
            # In pieces: a sum in another precision copies what it adds.
            total = sum(piece.sum(dtype=torch.float64).item() for piece in weight.detach().flatten().split(2**24))
            digest.update(f"{name} {tuple(weight.shape)} {total:.10g}".encode())
        return digest.hexdigest()[:24]

    @torch.no_grad()
    def activations(self, ids_RT: Tensor) -> Tensor:
        """What the hook point emits, fp32 `[R, T, D]`; nothing after it is computed."""
        return self._until(self._module, self.hook, input_ids=ids_RT.to(self.device), use_cache=False).float()

    def check_points(self, points: Sequence[HookPoint]) -> None:
        """Find hook points that the model does not have.

        Raises:
            ValueError: no such layer, or a block without such a part.
        """
        for point in points:
            self._module_at(point)

    @torch.no_grad()
    def activations_at(self, ids_RT: Tensor, points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
        """What each hook point emits, `[R, T, D]` in the model's own precision; one pass, which ends with the last."""
        seen: dict[HookPoint, Tensor] = {}

        def keeping(point: HookPoint) -> Replace:
            def keep(hidden: Tensor) -> Tensor:
                seen[point] = hidden
                if len(seen) == len(points):
                    raise _Reached
                return hidden

            return keep

        with contextlib.ExitStack() as hooks:
            for point in points:
                hooks.enter_context(_hooked(self._module_at(point), point.hook, keeping(point)))
            hooks.enter_context(contextlib.suppress(_Reached))
            self.model(input_ids=ids_RT.to(self.device), use_cache=False)
        return seen

    def _module_at(self, point: HookPoint) -> nn.Module:
        blocks = _blocks(self.model)
        _check_layer(point.layer, len(blocks))
        return _hooked_module(blocks[point.layer], point.hook)

    @torch.no_grad()
    def continuations(self, openings_PS: Tensor, ids_RT: Tensor) -> Tensor:
        """Activations fp32 `[R, T, D]` of rows that go on from openings, R/P rows in turn from each of the P.

        The same as `activations` of whole rows at their last T positions, but an opening is read once: its keys and
        values are kept. A model that keeps none reads whole rows.
        """
        from transformers import DynamicCache

        copies, kept = len(ids_RT) // len(openings_PS), 0
        cache = DynamicCache(config=self.model.config)
        # To the end of the block, so that its keys are there even if the hook stands before its attention.
        self._until(
            self._block, "resid_post", input_ids=openings_PS.to(self.device), past_key_values=cache, use_cache=True
        )
        with contextlib.suppress(ValueError):  # recurrent layers have no length
            kept = cache.get_seq_length()
        if kept != openings_PS.shape[1]:
            whole = torch.cat([openings_PS.repeat_interleave(copies, 0), ids_RT], 1)
            return self.activations(whole)[:, openings_PS.shape[1] :]
        cache.batch_repeat_interleave(copies)
        row = {"input_ids": ids_RT.to(self.device), "past_key_values": cache, "use_cache": True}
        return self._until(self._module, self.hook, **row).float()

    def _until(self, module: nn.Module, hook: Hook, **inputs: Any) -> Tensor:
        """Run the model as far as a hook, and return what passes there."""
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            raise _Reached

        with _hooked(module, hook, keep), contextlib.suppress(_Reached):
            self.model(**inputs)
        return seen[0]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks, in their order."""
        return list(_blocks(self.model))

    def replacing(self, replace: Replace) -> contextlib.AbstractContextManager[None]:
        """While entered, the hook's output passes through `replace`, whose result takes its place."""
        return _hooked(self._module, self.hook, replace)

    @torch.no_grad()
    def logits(self, ids_RT: Tensor, replace: Replace | None = None) -> Tensor:
        """The model's logits, fp32 `[R, T, V]`, with the hook's output replaced by `replace` of it."""
        if replace is None:
            return self.model(input_ids=ids_RT.to(self.device), use_cache=False).logits.float()
        with self.replacing(replace):
            return self.model(input_ids=ids_RT.to(self.device), use_cache=False).logits.float()


def load_language_model(config: ModelConfig, device: str | torch.device = "cpu") -> LanguageModel:
    """Load `config.name` (`embedded`, a folder, or a Hub id) for reading at its hook point.

    Raises:
        ValueError: it cannot be loaded, or has no such layer; the message names the field.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = model_path(config.name)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        architecture = AutoConfig.from_pretrained(path, **options)
        _check_layer(config.layer, architecture.get_text_config().num_hidden_layers)  # before gigabytes are read
        _check_fits(config, architecture, torch.device(device))
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **options)
    except (LayerError, RoomError):
        raise
    except UnpicklingError as error:  # transformers reads pytorch_model.bin with weights_only=True
        raise ValueError(
            f"model.name: {config.name!r} holds a pickle with code in it, which was not run; c2r reads "
            f"safetensors, and pickles of tensors alone ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"model.name: cannot load {config.name!r}; accepted are 'embedded', a folder in Hugging Face format, or a "
            f"Hub id: {error}"
        ) from error
    model = model.to(torch.device(device)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    return LanguageModel(model, tokenizer, layer=config.layer, hook=config.hook)


def _check_fits(config: ModelConfig, architecture: Any, device: torch.device) -> None:
    """Refuse a model whose weights alone are more than there is room for; nothing is loaded for it.

    Where the size cannot be known before (quantised weights, a model that cannot be made without memory) all pass.
    """
    from transformers import AutoModelForCausalLM

    if getattr(architecture, "quantization_config", None) is not None:
        return
    try:
        with torch.device("meta"):  # shapes without memory
            empty = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except (RuntimeError, NotImplementedError):
        return
    size = sum(weight.numel() for weight in empty.parameters()) * getattr(torch, config.dtype).itemsize
    for place in dict.fromkeys((torch.device("cpu"), device)):  # weights pass through the CPU's memory
        check_fits(
            f"model.name: the weights of {config.name!r} as {config.dtype}", size, place,
            "lower model.dtype (bfloat16 is half of float32), or take a smaller model",
        )  # fmt: skip


def _check_layer(layer: int, blocks: int) -> None:
    if not 0 <= layer < blocks:
        raise LayerError(f"model.layer: got {layer}; the model has {blocks} blocks, 0 to {blocks - 1}")


def model_path(name: str) -> str:
    """The folder of the embedded model, or the name itself."""
    return str(files("c2r") / "assets" / "embedded") if name == "embedded" else name


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: not a device, or not one that is here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"train.device: got {name!r}, which cannot be used here; accepted: auto, cpu, cuda, cuda:0… "
                         f"({str(error).splitlines()[0]})") from error  # fmt: skip
    return device


def _blocks(model: Any) -> nn.ModuleList:
    """The list of decoder blocks: the one ModuleList that is as long as the model has layers."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise ValueError(f"model.name: {type(model).__name__} has no list of {layers} blocks to hook into")
    return lists[0]


def _hooked_module(block: nn.Module, hook: Hook) -> nn.Module:
    """The module whose input (`resid_pre`) or output the hook is, by the names inside the block."""
    if hook in ("resid_pre", "resid_post"):
        return block
    children = dict(block.named_children())
    # With a norm behind each branch, that norm's output is what the residual stream receives.
    post_norms = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
    if all(name in children for name in post_norms.values()):
        return children[post_norms[hook]]
    parts = ("attn", "attention") if hook == "attn_out" else ("mlp",)
    apart = ("norm", "dropout")
    found = [
        module
        for name, module in children.items()
        if any(part in name for part in parts) and not any(other in name for other in apart)
    ]
    if len(found) != 1:
        raise ValueError(f"model.hook: got {hook!r}, but the block has no single such part; it has {list(children)}")
    return found[0]


class _hooked:
    """While entered, the hooked tensor passes through `function`, whose result takes its place."""

    def __init__(self, module: nn.Module, hook: Hook, function: Replace) -> None:
        self.module, self.hook, self.function = module, hook, function

    def __enter__(self) -> None:
        if self.hook == "resid_pre":
            self.handle = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            self.handle = self.module.register_forward_hook(self._after)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._apply(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._apply(kwargs["hidden_states"])}

    def _after(self, _: nn.Module, __: Any, output: Any) -> Any:
        return (self._apply(output[0]), *output[1:]) if isinstance(output, tuple) else self._apply(output)

    def _apply(self, hidden: Tensor) -> Tensor:
        return self.function(hidden).to(hidden.dtype)
