"""Configuration of the text: where documents come from, and how they become rows of tokens."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, field_validator, model_validator

from c2r.config.base import Frozen, Positive, at_home

# Keys accepted by each source. Saved configurations contain every key, so "given" means "differs from the default".
_KEYS_OF: dict[str, tuple[str, ...]] = {
    "stdlib": (),
    "files": (
        "path", "encoding", "text_field", "chat_field", "tokens_field", "mask_field", "shuffle_documents",
        "bad_records", "held_out",
    ),
    "hf": (
        "path", "name", "revision", "split", "streaming",
        "text_field", "chat_field", "tokens_field", "mask_field", "shuffle_documents", "bad_records", "held_out",
    ),
    "mixture": ("parts",),
}  # fmt: skip


class TextSource(Frozen):
    """A source of documents."""

    source: Literal["stdlib", "files", "hf", "mixture"] = "stdlib"
    """Kind of source. stdlib: source code of Python's standard library. files: local files. hf: a Hugging Face data
    set. mixture: several sources, listed in `parts`."""
    path: Annotated[str, BeforeValidator(at_home)] | None = None
    """For `files`: a .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of such files, or a glob pattern.
    For `hf`: a Hub id or a folder."""
    name: str | None = None
    """For `hf`: name of the data set's configuration; null: its default."""
    revision: str | None = None
    """For `hf`: branch, tag or commit on the Hub; null: the default branch."""
    split: str = "train"
    """For `hf`: split of the data set."""
    streaming: bool = True
    """For `hf`: whether to read the data set while downloading it; false: download it first and shuffle it as a
    whole."""
    encoding: str | None = None
    """For `files`: encoding of .txt and .jsonl files, any that Python supports; null: UTF-8. A byte order mark of
    UTF-8, UTF-16 or UTF-32 takes precedence."""
    text_field: str = "text"
    """Field of a record that contains its text."""
    chat_field: str | None = None
    """Field that contains a list of chat messages, rendered with the tokenizer's chat template; replaces
    `text_field`."""
    tokens_field: str | None = None
    """Field that contains a list of token ids, used without tokenisation; replaces `text_field`."""
    mask_field: str | None = None
    """With `tokens_field`: field that contains one 0 or 1 per token; activations of tokens with 0 are not used."""
    shuffle_documents: Positive | None = None
    """Number of documents per window within which documents are shuffled; null: 1000 for a streamed data set, 1 for
    files."""
    bad_records: Literal["error", "skip"] = "error"
    """What to do with unusable records (not JSON, a missing field, an unpaired surrogate, token ids unknown to the
    tokenizer). error: stop and name the record. skip: skip and count it."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Fraction of the documents held out from training for evaluation, chosen by a hash of each document's content. If
    this would be fewer than 4 documents, training and evaluation both use all documents, and evaluations report it."""

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        try:
            if encoding is not None:
                if codecs.lookup(encoding).incrementaldecoder is None:
                    raise LookupError
                b"".decode(encoding)  # raises for codecs that do not decode bytes to text
                "".encode(encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"got {encoding!r}; accepted are null (UTF-8) and Python's text encodings, for example "
                "utf-16-le, latin-1, cp1252"
            ) from None
        return encoding

    @model_validator(mode="after")
    def _check_source(self) -> TextSource:
        known = _KEYS_OF[self.source]
        if "path" in known and not self.path:
            raise ValueError(f"path: nothing given; source {self.source!r} needs one")
        if self.source == "stdlib" and self.path:
            raise ValueError(f"path: got {self.path!r}; source 'stdlib' takes none (did you mean `source: files`?)")
        for key in dict.fromkeys(key for keys in _KEYS_OF.values() for key in keys):
            if key not in known and self._given(key):
                owners = ", ".join(source for source, keys in _KEYS_OF.items() if key in keys)
                raise ValueError(f"{key}: got {getattr(self, key)!r}; source {self.source!r} takes none, only {owners}")
        forms = [key for key in ("text_field", "chat_field", "tokens_field") if self._given(key)]
        if len(forms) > 1:
            raise ValueError(f"{forms[1]}: given together with {forms[0]}; give only one of the two")
        if self.mask_field is not None and self.tokens_field is None:
            raise ValueError(f"mask_field: got {self.mask_field!r} without tokens_field; give both or neither")
        if self.shuffle_documents is not None and not self.streaming:
            raise ValueError(
                "shuffle_documents: not used with `streaming: false`, which shuffles the whole data set; remove it"
            )
        return self

    def _given(self, key: str) -> bool:
        return key in type(self).model_fields and getattr(self, key) != type(self).model_fields[key].get_default(
            call_default_factory=True
        )


class MixturePart(TextSource):
    """One of the sources of a mixture."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the tokens that come from this source, relative to the weights of the other parts."""

    @model_validator(mode="after")
    def _check_part(self) -> MixturePart:
        if self.source == "mixture":
            raise ValueError("source: got 'mixture' within a mixture; list its parts directly in the outer mixture")
        return self


class DataConfig(TextSource):
    """The text that the language model reads."""

    parts: list[MixturePart] = Field(default_factory=list)
    """For `mixture`: two or more sources, each with a `weight`."""
    spelling_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the tokens that come from spelling lists, generated from words in the tokenizer's vocabulary."""
    context: Annotated[int, Field(ge=2)] = 128
    """Number of tokens per row, the context that the language model reads at once."""
    drop_tokens: list[StrictInt | StrictStr] = Field(default_factory=list)
    """Tokens whose activations are not used, as ids or as strings that are a single token. The model still reads
    them."""
    prepend_bos: bool | None = None
    """Whether each row begins with the BOS token; null: if the tokenizer has one."""
    rows: Literal["packed", "as_is"] = "packed"
    """How documents become rows. packed: documents are concatenated and cut into rows. as_is: each record of
    `tokens_field` is one row, truncated or padded to `context`; nothing is joined or added."""
    parse_special_tokens: bool = False
    """Whether the text of a special token in a document, such as `<|endoftext|>`, becomes that token; false: it is
    treated as ordinary text. Special tokens from a chat template always become tokens."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Number of processes for tokenisation; 0: tokenise in the main process. The rows do not depend on it."""

    @model_validator(mode="after")
    def _check_parts(self) -> DataConfig:
        if self.source == "mixture" and len(self.parts) < 2:
            raise ValueError(f"parts: got {len(self.parts)}; source 'mixture' needs two or more")
        if self.rows == "as_is":
            without = [section for section, source in self.sections.items() if source.tokens_field is None]
            if without:
                raise ValueError(f"rows: got 'as_is', which needs tokens_field; {', '.join(without)} has none")
            for key in ("spelling_fraction", "prepend_bos"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key}: got {getattr(self, key)!r}, but `rows: as_is` adds nothing to the records"
                    )
        return self

    @property
    def sections(self) -> dict[str, TextSource]:
        """The sources by their location in the configuration: `data`, or `data.parts.0` and so on."""
        if self.source == "mixture":
            return {f"data.parts.{number}": part for number, part in enumerate(self.parts)}
        return {"data": self}


def text_to_evaluate(data: dict[str, Any], trained: dict[str, Any] | None) -> dict[str, Any]:
    """The text of an evaluation, with `held_out` set to the fraction that training held out of it.

    Arguments:
        data: the text, as keyword arguments of `DataConfig`.
        trained: the text of training, likewise; None if unknown. Text that training did not use, or held nothing out of
            (as in versions before `held_out`), is evaluated on as a whole.
    """

    def of(source: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
        keys = ("source", "path", "name", "split")
        if known is not None and any(_value(source, key) != _value(known, key) for key in keys):
            known = None
        if _value(source, "source") in ("files", "hf"):
            return source | {"held_out": 0.0 if known is None else known.get("held_out", 0.0)}
        parts, others = source.get("parts", []), (known or {}).get("parts", [])
        if not parts:
            return source
        return source | {"parts": list(map(of, parts, others if len(others) == len(parts) else [None] * len(parts)))}

    return of(data, trained)


def _value(source: dict[str, Any], key: str) -> Any:
    return source.get(key, TextSource.model_fields[key].default)
