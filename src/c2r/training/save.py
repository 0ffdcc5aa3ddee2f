"""Saving a trained SAE as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from c2r.config.known_features import SyntheticConfig
from c2r.config.run import RunConfig
from c2r.interop.saelens import save_sae
from c2r.penalty import lambda_of_strength, strength_of_lambda
from c2r.storage import cannot_write
from c2r.training.checkpoint import bytes_of
from c2r.training.run import Run
from c2r.training.source import Source


def save_run(
    run: Run[Any], config: RunConfig, source: Source, console: Console, *, tokens: int, stopped: str | None = None
) -> Path:
    """Save the SAE and its provenance; return its folder.

    Arguments:
        tokens: number of tokens trained on.
        stopped: why training ended early, or None.

    Raises:
        ValueError: no step has been made, weights contain NaN or infinity, or the folder cannot be written.
    """
    folder, point = config.output / run.config.name, config.point(run.config)
    metadata = source.metadata_of(run.config) | {"training_architecture": run.config.method}
    scale, median_norm = source.stream.scale[point], source.stream.median_norm[point]
    multiple = None if isinstance(config.data, SyntheticConfig) else config.stream.max_norm_multiple
    state = {"tokens": tokens, "stopped": stopped, "scale": scale, "median_norm": median_norm}
    state["max_norm"] = None if multiple is None else median_norm * multiple  # see `c2r.activations.counting`
    state["look"] = source.stream.look.get(point)
    ours = {
        "model": source.model_of(run.config),
        "seed": config.seed,
        "data": config.data.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "sae": run.config.model_dump(mode="json", by_alias=True),
        "state": {**state, **_both_units(run, config)},
        "identity": source.identity,
        "machines": run.machines,
    }
    sae = run.export(scale)
    try:
        save_sae(sae, folder, metadata=metadata, c2r=ours)
    except (OSError, SafetensorError) as error:
        raise ValueError(cannot_write(folder, bytes_of(sae.state_dict()), error)) from error
    console.print(f"saved {folder}")
    return folder


def _both_units(run: Run[Any], config: RunConfig) -> dict[str, float]:
    """C²R's strength in both units, λ and ρ."""
    c2r, shape = run.config.c2r, {"batch": config.train.batch, "width": run.config.width}
    if c2r is None:
        return {}
    if c2r.lam is not None:
        return {"lambda": c2r.lam, "strength": strength_of_lambda(c2r.lam, alpha=c2r.alpha, **shape)}
    strength = c2r.strength or 0.0
    return {"lambda": lambda_of_strength(strength, alpha=c2r.alpha, **shape), "strength": strength}
