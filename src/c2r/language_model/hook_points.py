"""Find where to hook a language model: its blocks, and the module in a block whose output is `attn_out` or `mlp_out`.

Both are found by running the model on a few tokens. Module names only suggest candidates; what a block or a part
computes decides.

R rows · T positions · D width of the residual stream.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from c2r.config.hooks import Hook

Replace = Callable[[Tensor], Tensor]
RunModel = Callable[[Tensor], Any]
"""Runs the whole model on token ids `[R, T]`."""


class Reached(Exception):
    """Ends a forward pass at the hook, which stores what it saw."""


class hooked:
    """Context manager that replaces the hooked tensor by `function` of it.

    The function's argument and result are not shared with the model, which gets copies, as it may change its tensors in
    place.
    """

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
        key = _stream_key(args, kwargs)
        if key is None:
            return (self._apply(args[0]), *args[1:]), kwargs
        return args, {**kwargs, key: self._apply(kwargs[key])}

    def _after(self, _: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, list):
            return [self._apply(output[0]), *output[1:]]
        return (self._apply(output[0]), *output[1:]) if isinstance(output, tuple) else self._apply(output)

    def _apply(self, hidden: Tensor) -> Tensor:
        copy = hidden.clone()
        result = self.function(copy)
        return hidden if result is copy else result.to(hidden.dtype, copy=True)


def until(module: nn.Module, hook: Hook, run: Callable[[], Any]) -> Tensor:
    """The tensor at a hook; the forward pass ends there.

    Raises:
        ValueError: the forward pass does not reach the hook.
    """
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        raise Reached

    with hooked(module, hook, keep), contextlib.suppress(Reached):
        run()
    if not seen:
        raise ValueError(f"model.layer: the model does not run {type(module).__name__} at {hook} on token ids alone")
    return seen[0]


class Blocks(NamedTuple):
    """The blocks of a language model."""

    modules: nn.ModuleList | nn.Sequential
    used: frozenset[int]
    """Indices of the blocks that run on text; a layer for images may not."""
    width: int
    """D, the width of the residual stream."""


class _Call(NamedTuple):
    before: Tensor
    after: Tensor


def find_blocks(model: nn.Module, run: RunModel, ids_RT: Tensor, at_least: int) -> Blocks:
    """The list of modules through which the residual stream `[R, T, D]` passes, one after another.

    Towers of other modalities are excluded because they do not run on text. Of nested lists the outer one is taken.

    Arguments:
        at_least: number of blocks according to the model's configuration.

    Raises:
        ValueError: there is no such list.
    """
    lists = {
        name: found
        for name, found in model.named_modules()
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) >= at_least
    }
    calls: dict[nn.Module, list[_Call | None]] = defaultdict(list)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before, after = _stream(args, kwargs), _first(output)
        if before is None or after is None or before.shape != after.shape or before.shape[:-1] != ids_RT.shape:
            calls[module].append(None)
        else:
            calls[module].append(_Call(before.clone(), after.clone()))

    with contextlib.ExitStack() as hooks:
        for module in dict.fromkeys(element for found in lists.values() for element in found):
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run(ids_RT)
    fitting: dict[str, Blocks] = {}
    for name, found in lists.items():  # outer lists come before the lists inside them
        used = [index for index, module in enumerate(found) if calls[module]]
        once = [calls[found[index]][0] for index in used if len(calls[found[index]]) == 1]
        passed = [call for call in once if call is not None]
        if used and len(passed) == len(used) and _chained(passed) and not _within(name, fitting):
            fitting[name] = Blocks(found, frozenset(used), passed[0].before.shape[2])
    if not fitting:
        raise ValueError(
            f"model.name: {type(model).__name__} has no list of {at_least} or more blocks that each run once on text "
            "and take and return the residual stream [rows, positions, width], so there is nothing to hook"
        )
    return max(fitting.values(), key=lambda blocks: len(blocks.modules))


def _chained(calls: list[_Call]) -> bool:
    """Whether each block's input is the output of the block before."""
    return all(
        one.after.shape == other.before.shape and _same(one.after, other.before) for one, other in pairwise(calls)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _within(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in outer)


def check_causal(model: nn.Module, blocks: Blocks, run: RunModel, ids_RT: Tensor, other_RT: Tensor) -> None:
    """Reject a model in which a token's activations depend on later tokens.

    Arguments:
        ids_RT: token ids.
        other_RT: token ids with the same first half of positions and a different second half.

    Raises:
        ValueError: activations in the first half differ.
    """
    last = blocks.modules[max(blocks.used)]
    one, other = (until(last, "resid_post", lambda ids=ids: run(ids)) for ids in (ids_RT, other_RT))
    half = ids_RT.shape[1] // 2
    change_RT = (one - other)[:, :half].float().norm(dim=-1) / one[:, :half].float().norm(dim=-1)
    # The median, because rounding can route single tokens to other experts.
    change = change_RT.median().item()
    if change > (1e-4 if one.dtype == torch.float32 else 0.02):
        raise ValueError(
            f"model.name: {type(model).__name__} lets tokens attend to later ones: activations change by "
            f"{change:.0%} when only later tokens change; accepted are causal language models (if this one was "
            "trained as a decoder, its config.json must say is_decoder: true)"
        )


def find_part(block: nn.Module, hook: Hook, run: RunModel, ids_RT: Tensor) -> nn.Module:
    """The module in a block whose output is added to the residual stream as `attn_out` or `mlp_out`.

    It is chosen so that resid_pre + attn_out + mlp_out = resid_post up to rounding, both in the unchanged model and
    with the module's output set to zero. So it comes after a post-norm if the block has one (Gemma 2, GLM-4), and
    before a residual connection inside the attention or MLP module (BLOOM).

    Raises:
        ValueError: the block has no such part, or none satisfies the equation; the message gives the error.
    """
    if hook in ("resid_pre", "resid_post"):
        return block
    paths = {name: module for name, module in block.named_modules() if name}
    seen = _pass(block, paths, run, ids_RT)
    pairs = _candidates(list(seen.outputs), hook)
    if not pairs:
        children = ", ".join(name for name, _ in block.named_children())
        raise ValueError(
            f"model.hook: got {hook!r}, but {type(block).__name__} has no such part (it has {children}); resid_pre and "
            "resid_post can be used"
        )
    missed = {pair: _missed(seen, pair) for pair in pairs}
    fitting = sorted(
        (pair for pair in pairs if missed[pair].fits), key=lambda pair: (missed[pair].share, _depth(pair[0]))
    )
    for pair in fitting:
        if pair[0] not in seen.flat:
            without = _pass(block, paths, run, ids_RT, zero=paths[pair[0]])
            if set(pair) <= set(without.outputs) and _missed(without, pair).fits:
                return paths[pair[0]]
    if fitting:
        part = fitting[0][0]
        reason = (
            "does not have the shape [rows, positions, width]" if part in seen.flat else "is also used elsewhere in it"
        )
        raise ValueError(
            f"model.hook: got {hook!r}, which is the output of {part} in {type(block).__name__}, but that {reason}; "
            "resid_pre and resid_post can be used"
        )
    named = [pair for pair in pairs if not any("norm" in name or _depth(name) for name in pair)] or pairs
    best = min(named, key=lambda pair: missed[pair].share)
    raise ValueError(
        f"model.hook: got {hook!r}, but no part of {type(block).__name__} outputs what is added to the residual "
        f"stream: with the best candidates ({best[0]} and {best[1]}), resid_pre + attn_out + mlp_out is off by "
        f"{missed[best].share:.0%} of what the block adds; resid_pre and resid_post can be used"
    )


def _candidates(order: list[str], hook: Hook) -> list[tuple[str, str]]:
    """Pairs of a candidate for the hooked part and one for the block's other part, most likely first.

    Arguments:
        order: names of modules in a block, in the order of computation.
    """
    attention = [name for name in order if "attn" in name or "attention" in name]
    others = [name for name in order if name not in attention]
    if hook == "attn_out":
        # The name of a norm after the attention may not mention attention; it comes before the other part.
        behind = [name for name in others if attention and order.index(name) > order.index(attention[0])]
        return [*product(attention, others), *((a, b) for i, a in enumerate(behind) for b in behind[i + 1 :])]
    # Before an MLP there may be something other than attention (a convolution, a recurrent layer) outside the MLP.
    return [
        (a, b)
        for a in others
        for b in order
        if b in attention or (order.index(b) < order.index(a) and b.split(".")[0] != a.split(".")[0])
    ]


def _depth(name: str) -> int:
    return name.count(".")


class _Seen(NamedTuple):
    pre: Tensor
    post: Tensor
    outputs: dict[str, Tensor]
    """Outputs `[R, T, D]` of the modules that run once, by name, in the order of computation."""
    flat: frozenset[str]
    """Names of those whose output is really `[R·T, D]`, which cannot be hooked."""


def _pass(
    block: nn.Module, paths: dict[str, nn.Module], run: RunModel, ids_RT: Tensor, zero: nn.Module | None = None
) -> _Seen:
    """One pass to the end of a block, with the output of the part `zero` set to zero."""
    stream: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor | None]] = defaultdict(list)

    def keep(name: str) -> Replace:
        def kept(hidden: Tensor) -> Tensor:
            stream[name] = hidden
            if name == "post":
                raise Reached
            return hidden

        return kept

    def note(name: str) -> Callable[..., None]:
        def noted(_: nn.Module, __: Any, output: Any) -> None:
            found, pre = _first(output), stream.get("pre")
            fits = found is not None and pre is not None and found.shape in (pre.shape, pre.flatten(0, 1).shape)
            outputs[name].append(found.clone() if fits and found is not None else None)

        return noted

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(hooked(block, "resid_pre", keep("pre")))
        hooks.enter_context(hooked(block, "resid_post", keep("post")))
        if zero is not None:
            hooks.enter_context(hooked(zero, "resid_post", torch.zeros_like))
        for name, module in paths.items():
            hooks.callback(module.register_forward_hook(note(name)).remove)
        hooks.enter_context(contextlib.suppress(Reached))
        run(ids_RT)
    once = {name: found[0] for name, found in outputs.items() if len(found) == 1 and found[0] is not None}
    shape = stream["pre"].shape
    flat = frozenset(name for name, found in once.items() if found.ndim == 2)
    return _Seen(stream["pre"], stream["post"], {name: found.view(shape) for name, found in once.items()}, flat)


class _Missed(NamedTuple):
    share: float
    """Norm of the error, divided by the norm of what the block adds."""
    fits: bool
    """Whether the error is only rounding, for every token."""


def _missed(seen: _Seen, pair: Iterable[str]) -> _Missed:
    terms = [seen.pre.float(), *(seen.outputs[name].float() for name in pair)]
    added, off = seen.post.float() - terms[0], sum(terms) - seen.post.float()
    rounding_RT = torch.finfo(seen.post.dtype).eps * sum(term.norm(dim=-1) for term in terms)
    fits = bool((off.norm(dim=-1) <= 1e-4 * added.norm(dim=-1) + rounding_RT).all())
    return _Missed((off.norm() / added.norm()).item(), fits)


def _first(output: Any) -> Tensor | None:
    """A module's output, or the first of several."""
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    return found if isinstance(found, Tensor) else None


def _stream_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The keyword argument by which a block gets the residual stream; None: its first positional argument."""
    if args:
        return None
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(
        (key for key, value in kwargs.items() if isinstance(value, Tensor) and value.ndim == 3), "hidden_states"
    )


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    key = _stream_key(args, kwargs)
    return _first(args[:1] if key is None else kwargs.get(key))
