"""Settings of evaluations: what `c2r.evaluate` takes, and `c2r eval --set a.b=c`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from c2r.config.base import Frozen, Positive, Share, at_home
from c2r.config.hooks import Hook

KEY = "C2R_JUDGE_KEY"
"""Environment variable that holds the judge's key."""


class FirstLetterSettings(Frozen):
    """Prompts of the first-letter task; the same as SAEBench's except for `words_per_prompt`."""

    words: Literal["all", "spaced"] | None = None
    """Which vocabulary entries are used: all that consist of letters, or only those with a leading space, which are
    whole words. null: all, except for the embedded model, which never learnt the letters of word pieces."""
    template: str = "{word} has the first letter:"
    """A line of the prompt; examples continue with a space and the letter in upper case."""
    examples: Annotated[int, Field(ge=0)] = 10
    """In-context examples before the word's line."""
    position: Annotated[int, Field(lt=0)] | None = None
    """Position whose activations are read, counted from the prompt's end; null: the word's token, which is −6 in
    SAEBench's template."""
    words_per_prompt: Positive = 4
    """Number of words that share the same random examples, which are then read only once; SAEBench uses 1."""
    max_words: Positive | None = None
    """Size of a random sample of the words; null: all words."""


class AbsorptionSettings(Frozen):
    """Thresholds and probes of the absorption metric; SAEBench's defaults except for `l1_batch`."""

    max_k: Positive = 10
    """Number of latents of the largest k-sparse probe."""
    l1_batch: Positive | None = None
    """Batch size of the L1 probe that ranks latents, 4096 in SAEBench; null: chosen by the number of samples."""
    f1_jump: Share = 0.03
    """Increase in F1 from one more latent above which that latent counts as a split of the class."""
    min_probe_f1: Share = 0.6
    """Only classes whose ground-truth probe has a higher F1 are evaluated."""
    min_classes: Positive = 20
    """With fewer such classes the result is not evaluable."""
    absorber_cosine: Share = 0.1
    """Absorption fraction: smallest cosine between an absorbing latent and the probe."""
    absorbers: Positive = 3
    """Absorption fraction: number of absorbing latents that count."""
    min_projection: Share = 0.4
    """Smallest share of the probe's projection that absorbing latents must carry."""
    full_cosine: Share = 0.025
    """Full absorption: smallest cosine between the one absorbing latent and the probe."""


class AbsorptionEvaluation(Frozen):
    """The evaluation `absorption`."""

    seeds: Positive = 3
    """Number of draws of split, prompts and probes; the first uses the evaluation's `seed`."""
    prompts: FirstLetterSettings = FirstLetterSettings()
    thresholds: AbsorptionSettings = AbsorptionSettings()


class Patience(Frozen):
    """How long to try for one answer of the judge."""

    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds for one attempt."""
    attempts: Positive = 6
    """Number of attempts."""
    first_wait: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the second attempt, doubled for each further one, unless the endpoint's Retry-After is longer."""


class JudgeConfig(Frozen):
    """The language model that `autointerp` asks, behind an OpenAI-compatible endpoint; its key is in C2R_JUDGE_KEY."""

    model_config = Frozen.model_config | ConfigDict(hide_input_in_errors=True)

    url: str
    """Base address of the endpoint, such as https://api.openai.com/v1."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the judge at the endpoint."""
    latents: Positive = 100
    """Latents per SAE to be judged, two requests each."""
    max_requests: Positive | None = None
    """Refuse to start if more requests would be needed; null: no limit."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as temperature or reasoning_effort."""
    workers: Positive = 8
    """Concurrent requests."""
    patience: Patience = Patience()
    key_in_clear: bool = False
    """Allow sending the key to another machine over plain http, where anyone on the way can read it."""

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        try:
            address = urlsplit(url)
            usable = address.scheme in ("http", "https") and bool(address.hostname)
            usable &= not (address.username or address.password or address.query or address.fragment)
        except ValueError:
            usable = False
        if not usable:  # the address is not repeated: it may contain a key
            raise ValueError(
                "accepted are http:// and https:// addresses such as https://api.openai.com/v1, without user, query "
                f"or fragment; put the key into the environment variable {KEY}"
            )
        return url

    @field_validator("options")
    @classmethod
    def _free(cls, options: dict[str, Any]) -> dict[str, Any]:
        if taken := {"model", "messages", "stream", "n"}.intersection(options):
            raise ValueError(f"got {', '.join(sorted(taken))}; accepted are other fields of a request")
        return options

    @property
    def address(self) -> str:
        """The address that requests are posted to."""
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


class EvaluationConfig(Frozen):
    """One call of `c2r.evaluate`, for SAEs that read the same hook point."""

    suites: Annotated[tuple[str, ...], Field(min_length=1)] = ("core", "splitting")
    """Names of the evaluations: core, absorption, splitting, probing, autointerp, audit, recovery, stability, and
    `saebench:…` for those of an installed sae-bench."""
    tokens: Positive = 50_000
    """Tokens to evaluate on, without padding, BOS and EOS."""
    seed: int = 0
    """Seed of the text's order and of every random choice of an evaluation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1…"""
    model: Annotated[str, BeforeValidator(at_home)] | None = None
    """Language model: embedded, a folder or a Hub id; null: the one each SAE was trained on."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Block that the SAEs read, counted from 0; null: what each SAE's file says."""
    hook: Hook | None = None
    """Hook point in that block; null: what each SAE's file says."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Settings of the text that replace those of training, by the names of the section `data`. By default the part of
    the training text that was held out is read."""
    trust_remote_code: bool = False
    """Let code that comes with a model run; what an SAE's own file says about this is ignored."""
    cache: Annotated[Path, BeforeValidator(at_home)] | None = None
    """Folder where activations are kept for later evaluations; null: `$C2R_CACHE`, or `c2r` in the user's cache
    folder."""
    probe_data: Annotated[str, BeforeValidator(at_home)] | None = None
    """probing: labelled texts, a .jsonl file of {"text", "label"} or a data set; null: tasks made from the standard
    library."""
    absorption: AbsorptionEvaluation = AbsorptionEvaluation()
    judge: JudgeConfig | None = None
    """autointerp: the judge."""
