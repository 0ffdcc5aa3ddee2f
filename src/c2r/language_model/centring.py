"""Subtract from activations their mean over coordinates, as TransformerLens's processed weights do.

R rows · T positions in a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from c2r.config.hooks import Hook
from c2r.language_model.hook_points import RunModel, find_part, hooked

_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 0.05


@torch.no_grad()
def center(model: Any, blocks: Iterable[nn.Module], run: RunModel, ids_RT: Tensor, name: str) -> None:
    """Permanently subtract the mean over coordinates from the activations at every hook point.

    TransformerLens centres the weights that write to the residual stream, so each hook point emits the centred
    activation. Like TransformerLens, this leaves models with RMSNorm unchanged.

    Arguments:
        blocks: the decoder blocks.
        run: runs the whole model on token ids.
        ids_RT: a few tokens to test with.
        name: name of the model, for errors.

    Raises:
        ValueError: the model's output depends on the subtracted mean.
    """
    blocks = list(blocks)
    norms = {type(module).__name__ for block in blocks for module in block.modules() if "Norm" in type(module).__name__}
    if norms and all("RMS" in norm for norm in norms):
        return
    points: list[tuple[nn.Module, Hook]] = []
    for block in blocks:
        for hook in get_args(Hook):
            with contextlib.suppress(ValueError):  # the block has no such part
                points.append((find_part(block, hook, run, ids_RT), hook))
    before = run(ids_RT).logits.float()
    for part, hook in points:  # only after all are found: hooks would change the activations by which parts are found
        hooked(part, hook, lambda x: x - x.mean(-1, keepdim=True)).__enter__()
    after = run(ids_RT).logits.float()
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_HALF)
    change = ((after - before).abs().max() / before.std()).item()
    if not change < tolerance:
        raise ValueError(
            f"model.center_writing_weights: the output of {name!r} depends on the mean over coordinates that would be "
            f"subtracted (logits change by {change:.2g} of their standard deviation); set it to false (normalization "
            f"layers found: {', '.join(sorted(norms)) or 'none'})"
        )
