"""Selection of the top-k family: which pre-activations become activations.

B tokens in a batch · F latents · N non-zeros in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from c2r.codes import Support
from c2r.tiles import entries_above

_BELOW_CUT = 0.9


class BatchTopK:
    """The B·k largest positive pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    A running floor a little below the last cut leaves a few B·k candidates, and the exact top-k runs on those
    alone; where the floor left too few, it runs on everything. The set is the exact one either way.
    """

    def __init__(self) -> None:
        self.floor: float | None = None

    @torch.no_grad()
    def select(self, pre_BF: Tensor, k: int) -> Support:
        """Where the `B·k` largest positive entries of `pre_BF` are; fewer where fewer are positive."""
        batch, width = pre_BF.shape
        total = min(batch * k, pre_BF.numel())
        candidates = None if self.floor is None else entries_above(pre_BF, self.floor)
        if candidates is not None and len(candidates.values) >= total:
            values, among = candidates.values.topk(total, sorted=False)
            chosen = candidates.rows[among] * width + candidates.columns[among]
        else:
            values, chosen = pre_BF.flatten().topk(total, sorted=False)
        cut = values.min().item()
        self.floor = cut * _BELOW_CUT if cut > 0 else None
        chosen = chosen[values > 0].sort().values
        return Support(chosen % width, chosen // width, batch, width)


@torch.no_grad()
def top_k_of_each_token(pre_BF: Tensor, k: int, *, signed: bool = False) -> Support:
    """The `k` largest positive entries of each row (Gao et al. 2024); with `signed`, the largest in absolute value."""
    batch, width = pre_BF.shape
    best = (pre_BF.abs() if signed else pre_BF).topk(min(k, width), dim=1, sorted=False)
    latents_BK = best.indices.sort(dim=1).values
    kept_BK = pre_BF.gather(1, latents_BK) != 0 if signed else pre_BF.gather(1, latents_BK) > 0
    tokens_BK = torch.arange(batch, device=pre_BF.device)[:, None].expand_as(latents_BK)
    return Support(latents_BK[kept_BK], tokens_BK[kept_BK], batch, width)
