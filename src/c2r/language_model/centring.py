"""Activations whose mean over coordinates is subtracted, as TransformerLens's processed weights emit them.

R rows · T positions · D width of the residual stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from c2r.config.hooks import Hook
from c2r.language_model.hook_points import Run, find_part, hooked

_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 0.05


@torch.no_grad()
def center(model: Any, blocks: Iterable[nn.Module], run: Run, ids_RT: Tensor, name: str) -> None:
    """Subtract from everything that hooks see its mean over coordinates, for good.

    TransformerLens centres the weights that write to the residual stream; what that leaves at each hook point is the
    centred activation. Nothing is done to models with RMSNorm, as there.

    Arguments:
        blocks: the decoder blocks.
        run: runs the whole model on token ids.
        ids_RT: a few tokens to test with.
        name: the model's, for errors.

    Raises:
        ValueError: the model's output depends on that mean, or it cannot be seen how it is normalised.
    """
    blocks = list(blocks)
    norms = {type(module).__name__ for block in blocks for module in block.modules() if "Norm" in type(module).__name__}
    if norms and all("RMS" in norm for norm in norms):
        return
    points: list[tuple[nn.Module, Hook]] = []
    for block in blocks:
        for hook in get_args(Hook):
            with contextlib.suppress(ValueError):  # a block without such a part
                points.append((find_part(block, hook, run, ids_RT), hook))
    before = run(ids_RT).logits.float()
    for part, hook in points:  # once all are found: a part is found by what passes at the others
        hooked(part, hook, lambda x: x - x.mean(-1, keepdim=True)).__enter__()
    after = run(ids_RT).logits.float()
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_HALF)
    change = ((after - before).abs().max() / before.std()).item()
    if not change < tolerance:
        raise ValueError(
            f"model.center_writing_weights: the output of {name!r} depends on the mean over coordinates that would be "
            f"subtracted (logits change by {change:.2g} of their spread); norms of its blocks: {sorted(norms)}"
        )
