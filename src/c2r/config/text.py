"""What a YAML may say about text: where documents come from, and how they become rows of tokens."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, field_validator, model_validator

from c2r.config.base import Frozen, Positive, at_home

# Keys that only some sources know. Saved configurations name every key, so that "given" means "not the default".
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
    encoding: str | None = None
    """files: encoding of text and JSON lines without a byte order mark, any that Python knows; null: UTF-8. A byte
    order mark of UTF-8, UTF-16 or UTF-32 always decides."""
    text_field: str = "text"
    chat_field: str | None = None
    """Field of a list of messages, which the tokenizer's chat template makes text of; instead of `text_field`."""
    tokens_field: str | None = None
    """Field of a list of token ids, used as they are; instead of `text_field`."""
    mask_field: str | None = None
    """With `tokens_field`: field of 0 or 1 a token; activations of tokens with 0 are not used."""
    shuffle_documents: Positive | None = None
    """Documents are shuffled within windows of so many; null: 1000 of a streamed data set, 1 of files."""
    bad_records: Literal["error", "skip"] = "error"
    """What happens at a record that cannot be used (not JSON, a missing field, half of a surrogate pair, ids that the
    tokenizer does not have): an error that names it, or it is skipped and counted."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the documents that training leaves to evaluations, chosen by a hash of each document's content. A source
    in which this would be fewer than 4 documents is read whole by both, and evaluations say so."""

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        try:
            if encoding is not None:
                if codecs.lookup(encoding).incrementaldecoder is None:
                    raise LookupError
                b"".decode(encoding)  # refuses codecs that do not make text of bytes
                "".encode(encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"got {encoding!r}; accepted are null (UTF-8) and the text encodings that Python knows, for example "
                "utf-16-le, latin-1, cp1252"
            ) from None
        return encoding

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
    spelling_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of tokens that come from spelling lists, made of the tokenizer's own words."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens of a row that the model reads at once."""
    drop_tokens: list[StrictInt | StrictStr] = Field(default_factory=list)
    """Tokens whose activations are not used: ids, or strings that are one token. The model reads them all the same."""
    prepend_bos: bool | None = None
    """Whether each row opens with BOS; null: where the tokenizer has one."""
    rows: Literal["packed", "as_is"] = "packed"
    """packed: documents are joined and cut into rows. as_is: each record of `tokens_field` is one row, cut or padded to
    `context`; nothing is joined or added."""
    parse_special_tokens: bool = False
    """Whether a special token that is spelled out in a document (`<|endoftext|>`) becomes that token; false: it is text
    like any other. A chat template's own are always tokens."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0: this one does. Rows do not depend on it."""

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
                    raise ValueError(f"{key}: got {getattr(self, key)!r}, but rows: as_is adds nothing to the records")
        return self

    @property
    def sections(self) -> dict[str, TextSource]:
        """The sources by where they stand in the YAML: `data`, or `data.parts.0` and on."""
        if self.source == "mixture":
            return {f"data.parts.{number}": part for number, part in enumerate(self.parts)}
        return {"data": self}


def text_to_evaluate(data: dict[str, Any], trained: dict[str, Any] | None) -> dict[str, Any]:
    """The text of an evaluation, with the share that training left out of it.

    Arguments:
        data: what `DataConfig` takes.
        trained: the same of training; None: not known. Text that training did not read is evaluated on whole, and so is
            text from which it left nothing out, as before there was `held_out`.
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
