"""Schedules: learning rate, k, sparsity, p and the threshold's average as functions of the step number.

Steps count from 0; `steps` is the number of steps of the run. Lengths left at null are derived from `steps`, so that
warm-up does not take up most of a short run.
"""

from __future__ import annotations

from c2r.config.run import TrainConfig
from c2r.config.saes import JumpReLUConfig, PAnnealConfig, StandardConfig, TopKConfig

P_STAGES = 10
"""Number of equal stages in which p decreases."""


def ramp(step: int, steps: int) -> float:
    """Linear from 0 at step 0 to 1 at step `steps`, then 1."""
    return min(step / steps, 1.0) if steps else 1.0


def warmup_steps(train: TrainConfig) -> int:
    """Steps of linear learning-rate warm-up: as configured; by default 1000, but at most a twentieth of the steps."""
    return min(1000, train.steps // 20) if train.warmup_steps is None else train.warmup_steps


def learning_rate_factor(step: int, train: TrainConfig) -> float:
    """Factor of the learning rate: linear warm-up from 0, constant, linear decay to 0."""
    warmup, decay = warmup_steps(train), int(train.decay_from * train.steps)
    if step < warmup:
        return step / warmup
    if step >= decay and decay < train.steps:
        return (train.steps - step) / (train.steps - decay)
    return 1.0


def k_of_step(config: TopKConfig, step: int, steps: int, d_in: int) -> int:
    """k in this step: falls linearly from min(D, F) to its configured value over the first `k_anneal` of the steps."""
    annealed = round(config.k_anneal * steps)
    if step >= annealed:
        return config.k
    begin = min(d_in, config.width)
    return int(begin + (config.k - begin) * step / annealed)


def sparsity_warmup(config: StandardConfig | JumpReLUConfig, step: int, steps: int) -> float:
    """Factor of the sparsity term: linear from 0 to 1 over `sparsity_warmup_steps` (see `StandardConfig`)."""
    given = config.sparsity_warmup_steps
    return ramp(step, min(2000, steps // 10) if given is None else given)


def annealed_p(config: PAnnealConfig, step: int, steps: int) -> float:
    """The p of Lp: decreases from 1 to `p_end` in equal stages (Karvonen et al. 2024, arXiv 2408.00113)."""
    done = (step / steps - config.anneal_from) / (config.anneal_to - config.anneal_from)
    stage = min(max(int(done * P_STAGES) + 1, 0), P_STAGES) if done >= 0 else 0
    return 1 - (1 - config.p_end) * stage / P_STAGES


def threshold_start(config: TopKConfig, steps: int) -> int:
    """Last step before the threshold's average begins: as configured; by default 1000, but at most half the steps."""
    return min(1000, steps // 2 - 1) if config.threshold_start is None else config.threshold_start


def threshold_decay(config: TopKConfig, steps: int) -> float:
    """Decay of the threshold's moving average: by default 0.999; in a short run it spans a tenth of the steps."""
    if config.threshold_decay is not None:
        return config.threshold_decay
    return min(0.999, 1 - 1 / max(1.0, (steps - threshold_start(config, steps)) / 10))
