"""What a YAML may say about text: where documents come from, and how they become rows of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, model_validator

from c2r.methods import Frozen, Positive, at_home

# Keys that only some sources know. Saved configurations name every key, so that "given" means "not the default".
_KEYS_OF: dict[str, tuple[str, ...]] = {
    "stdlib": (),
    "files": ("path", "text_field", "chat_field", "tokens_field", "mask_field", "shuffle_documents"),
    "hf": (
        "path", "name", "revision", "split", "streaming",
        "text_field", "chat_field", "tokens_field", "mask_field", "shuffle_documents",
    ),
    "mixture": ("parts",),
}  # fmt: skip


class TextSource(Frozen):
    """Where documents come from."""

    source: Literal["stdlib", "files", "hf", "mixture"] = "stdlib"
    path: Annotated[str, BeforeValidator(at_home)] | None = None
    """files: a file that ends in .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet, a folder or a glob.
    hf: a Hub id or a folder."""
    name: str | None = None
    """hf: the data set's configuration."""
    revision: str | None = None
    """hf: branch, tag or commit on the Hub."""
    split: str = "train"
    """hf."""
    streaming: bool = True
    """hf: read while it is fetched; false: downloaded first, and shuffled as a whole."""
    text_field: str = "text"
    chat_field: str | None = None
    """Field of a list of messages, which the tokenizer's chat template makes text of; instead of `text_field`."""
    tokens_field: str | None = None
    """Field of a list of token ids, used as they are; instead of `text_field`."""
    mask_field: str | None = None
    """With `tokens_field`: field of 0 or 1 a token; activations of tokens with 0 are not used."""
    shuffle_documents: Positive | None = None
    """Documents are shuffled within windows of so many; null: 1000 of a streamed data set, 1 of files."""

    @model_validator(mode="after")
    def _check_source(self) -> TextSource:
        known = _KEYS_OF[self.source]
        if "path" in known and not self.path:
            raise ValueError(f"path: nothing given; source {self.source!r} needs one")
        if self.source == "stdlib" and self.path:
            raise ValueError(f"path: got {self.path!r}; source 'stdlib' takes none (did you mean source: files?)")
        for key in dict.fromkeys(key for keys in _KEYS_OF.values() for key in keys):
            if key not in known and self._given(key):
                owners = ", ".join(source for source, keys in _KEYS_OF.items() if key in keys)
                raise ValueError(f"{key}: got {getattr(self, key)!r}; source {self.source!r} takes none, only {owners}")
        forms = [key for key in ("text_field", "chat_field", "tokens_field") if self._given(key)]
        if len(forms) > 1:
            raise ValueError(f"{forms[1]}: given beside {forms[0]}; a document has one form, so give one of the two")
        if self.mask_field is not None and self.tokens_field is None:
            raise ValueError(f"mask_field: got {self.mask_field!r}, which goes with tokens_field; none is given")
        if self.shuffle_documents is not None and not self.streaming:
            raise ValueError("shuffle_documents: given, but with streaming: false the whole data set is shuffled")
        return self

    def _given(self, key: str) -> bool:
        return key in type(self).model_fields and getattr(self, key) != type(self).model_fields[key].get_default(
            call_default_factory=True
        )


class MixturePart(TextSource):
    """One source of several."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the tokens, relative to the other parts' weights."""

    @model_validator(mode="after")
    def _check_part(self) -> MixturePart:
        if self.source == "mixture":
            raise ValueError("source: got 'mixture' within a mixture; list its parts beside the others")
        return self


class DataConfig(TextSource):
    """The text."""

    parts: list[MixturePart] = Field(default_factory=list)
    """mixture: two sources or more, each with a `weight`."""
    words: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of tokens that come from spelling lists, made of the tokenizer's own words."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens of a row that the model reads at once."""
    drop_tokens: list[StrictInt | StrictStr] = Field(default_factory=list)
    """Tokens whose activations are not used: ids, or strings that are one token. The model reads them all the same."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0: this one does. Rows do not depend on it."""

    @model_validator(mode="after")
    def _check_parts(self) -> DataConfig:
        if self.source == "mixture" and len(self.parts) < 2:
            raise ValueError(f"parts: got {len(self.parts)}; source 'mixture' needs two or more")
        return self

    @property
    def sections(self) -> dict[str, TextSource]:
        """The sources by where they stand in the YAML: `data`, or `data.parts.0` and on."""
        if self.source == "mixture":
            return {f"data.parts.{number}": part for number, part in enumerate(self.parts)}
        return {"data": self}
