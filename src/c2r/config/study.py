"""A study: several arms, each trained with several seeds, on shared streams of activations, then evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from c2r.config.base import Frozen, Positive, at_home
from c2r.config.evaluations import EvaluationConfig
from c2r.config.faults import faults
from c2r.config.load import parse_config, read_mapping, set_values
from c2r.config.run import RunConfig


class StudyConfig(Frozen):
    """The YAML of `c2r study`."""

    output: Annotated[Path, BeforeValidator(at_home)]
    """Folder of the study; each group of seeds has a run's folder inside."""
    run: dict[str, Any]
    """A run's configuration without `output` and `saes`: model, data, stream, cache, train. Its `seed` decides the
    order of the activations, which all arms of a group share; groups after the first add their number to it, unless
    there is a cache, whose order is fixed."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name of an arm → the section of its SAE, without `name` and `seed`."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """Training seeds; arms with the same seed start from the same weights."""
    only: dict[str, list[int]] = Field(default_factory=dict)
    """Arms that are trained with some of the seeds only, and these seeds."""
    seeds_per_run: Positive = 1
    """Seeds that share one stream of activations, and so one pass of the language model."""
    against: str
    """The arm that all others are compared with."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if self.against not in self.arms:
            raise ValueError(f"against: got {self.against!r}; accepted are {', '.join(self.arms)}")
        if twice := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(f"seeds: {twice} are given more than once")
        for arm, seeds in self.only.items():
            if arm not in self.arms:
                raise ValueError(f"only.{arm}: no such arm; accepted are {', '.join(self.arms)}")
            if unknown := sorted(set(seeds) - set(self.seeds)):
                raise ValueError(f"only.{arm}: {unknown} are not among the seeds {self.seeds}")
        if fixed := {"output", "saes"} & self.run.keys():
            raise ValueError(f"run.{min(fixed)}: the study decides it; remove it")
        return self

    @property
    def groups(self) -> list[list[int]]:
        """The seeds of each run."""
        return [self.seeds[i : i + self.seeds_per_run] for i in range(0, len(self.seeds), self.seeds_per_run)]

    def arms_of(self, seed: int) -> list[str]:
        """The arms that are trained with a seed."""
        return [arm for arm in self.arms if seed in self.only.get(arm, self.seeds)]

    def runs(self) -> list[RunConfig]:
        """One run per group of seeds.

        Raises:
            ValueError: what a run's configuration refuses; names the arm or the key.
        """
        found = []
        for number, group in enumerate(self.groups):
            saes = [
                {**self.arms[arm], "name": sae_name(arm, seed), "seed": seed}
                for seed in group
                for arm in self.arms_of(seed)
            ]
            shift = 0 if "cache" in self.run else number
            raw = {**self.run, "seed": self.run.get("seed", 0) + shift, "saes": saes}
            raw["output"] = self.output / f"seeds-{'-'.join(map(str, group))}"
            found.append(parse_config(raw, f"run of seeds {', '.join(map(str, group))}"))
        return found


def sae_name(arm: str, seed: int) -> str:
    """Name of an arm's SAE."""
    return f"{arm}-{seed}"


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> StudyConfig:
    """Read a study's YAML and apply `a.b=c` overrides.

    Raises:
        ValueError: see `load_config`; also what the configuration of its runs refuses.
    """
    raw = read_mapping(path, "output, run, arms, seeds, against")
    set_values(raw, overrides)
    try:
        study = StudyConfig.model_validate(raw)
    except ValidationError as error:
        lines = faults(error, lambda location: list(StudyConfig.model_fields) if not location else [])
        raise ValueError(f"{path}: {len(lines)} error(s)\n" + "\n".join(f"  {line}" for line in lines)) from None
    study.runs()
    return study
