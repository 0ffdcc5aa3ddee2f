"""Whether SAEs that differ only in their seed find the same latents (PW-MCC), compared with random dictionaries.

The latents of two dictionaries are paired one to one so that the sum of |cos| of their decoder rows is largest
(Hungarian matching); the score is the mean |cos| over pairs. Dead latents are included: their rows have stayed close to
their random initialisation, which pulls the score towards that of random dictionaries.

D width of the activations · F, G rows of two dictionaries.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor
from torch.nn import functional as F

from c2r.eval.bench import Bench
from c2r.eval.outcome import Outcome
from c2r.sae.model import SAE

LARGEST, SAMPLED = 8192, 2048
"""If dictionaries have more than `LARGEST` latents, `SAMPLED` random ones of the first are matched with all of the
second."""
EVALUATION = "stability"


@torch.no_grad()
def matched_cosine(a_FD: Tensor, b_GD: Tensor) -> float:
    """Mean |cos| of the one-to-one pairing of rows with the largest sum of |cos|, which has min(F, G) pairs."""
    from scipy.optimize import linear_sum_assignment

    a_FD, b_GD = F.normalize(a_FD.float(), dim=1), F.normalize(b_GD.to(a_FD.device).float(), dim=1)
    cosine_FG = (a_FD @ b_GD.T).abs().cpu().numpy()
    return float(cosine_FG[linear_sum_assignment(cosine_FG, maximize=True)].mean())


def agreement(a_FD: Tensor, b_FD: Tensor, seed: int = 0) -> float:
    """`matched_cosine` of two dictionaries. Above `LARGEST` rows it overestimates: fewer rows compete for a partner."""
    if len(a_FD) > LARGEST:
        a_FD = a_FD[torch.randperm(len(a_FD), generator=torch.Generator().manual_seed(seed))[:SAMPLED].to(a_FD.device)]
    return matched_cosine(a_FD, b_FD)


def random_agreement(width: int, d_in: int, seed: int = 0) -> float:
    """`agreement` of two random dictionaries of this shape."""
    generator = torch.Generator().manual_seed(seed)
    a_FD, b_FD = torch.randn(2, width, d_in, generator=generator)
    return agreement(a_FD, b_FD, seed)


def run_stability(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """Evaluate each SAE's mean agreement with the others, and that of random dictionaries of the same shape."""
    names = list(saes)
    shapes = {name: (sae.width, sae.d_in) for name, sae in saes.items()}
    if len(names) < 2 or len(set(shapes.values())) > 1:
        fault = (
            f"stability needs at least two SAEs of the same shape, trained with different seeds; got [F, D] {shapes}"
        )
        yield from (Outcome(name, EVALUATION, error=fault) for name in names)
        return
    for doubt in doubts([sae.config for sae in saes.values()]):
        bench.console.print(f"[yellow]stability: {escape(doubt)}[/]")
    floor = random_agreement(*shapes[names[0]], bench.config.seed)
    found: dict[frozenset[str], float] = {}
    for one, other in itertools.combinations(sorted(names), 2):  # sorted: which one is sampled must not depend on order
        found[frozenset((one, other))] = agreement(saes[one].W_dec, saes[other].W_dec, bench.config.seed)
    for name in names:
        others = {other: found[frozenset((name, other))] for other in names if other != name}
        mean = statistics.fmean(others.values())
        yield Outcome(
            name,
            EVALUATION,
            {"stability": {"pw_mcc": mean, "random": floor, "saes": len(names)}},
            {"pw_mcc": mean, "pw_mcc_random": floor},
            config={"sampled_latents": SAMPLED if shapes[name][0] > LARGEST else None},
            details=[{"with": other, "pw_mcc": value} for other, value in others.items()],
        )


def doubts(configs: list[dict[str, Any]]) -> list[str]:
    """Reasons why comparing SAEs with these `cfg.json` may say little about the effect of the seed."""
    found = []
    if len(configs) < 3:
        found.append(f"only {len(configs)} SAEs; 3 or more seeds are recommended")
    ours = [config["c2r"] for config in configs if "c2r" in config]
    own = [(one.get("sae") or {}).get("seed") for one in ours]
    seeds = [one.get("seed") if seed is None else seed for one, seed in zip(ours, own, strict=True)]
    if len(set(seeds)) < len(seeds):
        found.append(f"the SAEs were initialised with the seeds {seeds}; equal seeds start equal, so they agree anyway")
    settings = [{part: dict(one.get(part) or {}) for part in ("model", "data", "train", "sae")} for one in ours]
    differing = sorted(
        f"{part}.{key}"
        for part in ("model", "data", "train", "sae")
        for key in set().union(*(one[part] for one in settings))
        if len({json.dumps(one[part].get(key), sort_keys=True) for one in settings}) > 1
    )
    differing = [key for key in differing if key not in ("sae.name", "sae.seed", "train.device", "train.log_every")]
    if differing:
        found.append(f"the SAEs differ not only in their seed but also in {', '.join(differing)}")
    return found
