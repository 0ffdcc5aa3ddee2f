"""The published training step, dense, as plain PyTorch: what c2r's step is measured beside.

Faithful to arXiv 2606.30609's BatchTopK trainer in what it computes: six dense products (encode, decode, and their
backwards, the one to the input included), a flat top-k over B·F, and C²R by a chunked search inside autograd, two dense
F×chunk products and their backward, every fifth step. Adam as published (not fused). Its numbers equal c2r's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PublishedStep:
    """One SAE under the published step; `autocast` runs it under bf16 autocast, as the release does."""

    def __init__(
        self, d_in: int, width: int, k: int, *, lam: float = 1.0, every: int = 5, chunk: int = 8192, autocast: bool,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.k, self.lam, self.every, self.chunk, self.autocast = k, lam, every, chunk, autocast
        random = torch.randn(width, d_in, generator=torch.Generator().manual_seed(0))
        rows = nn.functional.normalize(random, dim=1).to(device)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows.T.clone())  # [F, D], [D, F]
        self.b_enc, self.b_dec = (nn.Parameter(torch.zeros(size, device=device)) for size in (width, d_in))
        self.parameters = [self.encoder, self.decoder, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, betas=(0.9, 0.999))
        self.number = 0

    def __call__(self, x: Tensor) -> None:
        """One update."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            pre = nn.functional.relu((x - self.b_dec) @ self.encoder.T + self.b_enc)
            best = pre.flatten().topk(self.k * len(x), sorted=False)
            acts = torch.zeros_like(pre).flatten().scatter(-1, best.indices, best.values).view_as(pre)
            error = x - (acts @ self.decoder.T + self.b_dec)
            loss = error.pow(2).sum(-1).mean()
            if self.lam and self.number % self.every == 0:
                loss = loss + self.lam * self.every * chunked_penalty(acts, self.decoder.T, self.chunk)
        loss.backward()
        with torch.no_grad():
            unit = self.decoder / self.decoder.norm(dim=0)
            assert self.decoder.grad is not None
            self.decoder.grad -= (self.decoder.grad * unit).sum(0) * unit
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.decoder /= self.decoder.norm(dim=0)
        self.number += 1


def chunked_penalty(acts: Tensor, decoder: Tensor, chunk: int = 8192) -> Tensor:
    """C²R within chunks of a random permutation, the whole cosine matrix of each in the graph, as published."""
    width, total = len(decoder), torch.zeros((), dtype=torch.float32)
    norms = acts.float().norm(dim=0)
    unit = nn.functional.normalize(decoder, dim=1)
    for members in torch.randperm(width).split(chunk):
        cosine = unit[members] @ unit[members].T
        cosine = cosine.masked_fill(torch.eye(len(members), dtype=torch.bool), -torch.inf)
        best, among = cosine.max(1)
        total = total + (best.relu().square() * (norms[members] + norms[members[among]])).sum()
    return total / width
