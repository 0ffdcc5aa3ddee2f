"""The tokenizer of a language model, and what stands in for it where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from c2r.text.tokenizing import beyond, special_ids

_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")


class NoTokenizer:
    """Stands where a model has no tokenizer: token ids are read as they are, and text cannot be read.

    Nothing is put before, between or behind the documents' ids. What the model's configuration calls BOS, EOS and
    padding is special wherever the data have it.

    Arguments:
        model: its name, for errors.
        size: ids are below this.
        special: special ids.
    """

    bos_token_id = eos_token_id = pad_token_id = None
    chat_template = None

    def __init__(self, model: str, size: int, special: Iterable[int] = ()) -> None:
        self.model, self.size = model, size
        self.all_special_ids = sorted({index for index in special if 0 <= index < size})

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        """Every id under its own number."""
        return {f"<{index}>": index for index in range(self.size)}

    def convert_ids_to_tokens(self, index: int) -> str:
        """The id's number."""
        return f"<{index}>"

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """The ids' numbers."""
        return "".join(f"<{int(index)}>" for index in ids)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """There is nothing that could read text.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"model.tokenizer: {self.model!r} has no tokenizer, and text needs one; give a folder or a Hub id that "
            "has it (or data of token ids, with data.tokens_field)"
        )


def load_tokenizer(model: str, path: str, own: str | None, architecture: Any, **options: Any) -> Any:
    """The tokenizer of a model.

    Arguments:
        model: the model's name, for errors.
        path: its folder or Hub id.
        own: folder or Hub id of the tokenizer; None: the model's.
        architecture: the model's configuration.
        options: `revision` (of the model) and `trust_remote_code`.

    Returns:
        A Hugging Face tokenizer, or `NoTokenizer` for a model's folder without one.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if own is not None:
        options["revision"] = None
    elif Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in _FILES):
        return _stand_in(model, architecture)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if own is None else own, **options)
    except Exception as error:  # tokenizers are read by many libraries, which raise what they like
        raise ValueError(
            f"model.tokenizer: cannot load the tokenizer of {own or model!r}; model.tokenizer may name a folder or a "
            f"Hub id that has one: {error}"
        ) from error
    # Without files some classes make a tokenizer of special tokens alone.
    if set(tokenizer.get_vocab().values()) <= special_ids(tokenizer):
        if own is not None:
            raise ValueError(
                f"model.tokenizer: {own!r} has no tokenizer; accepted are a folder or a Hub id that has one"
            )
        return _stand_in(model, architecture)
    return tokenizer


def fit_tokenizer(tokenizer: Any, rows: int | None) -> None:
    """Make a tokenizer's special tokens fit the rows of the model's embeddings.

    A padding token beyond them is given up: padding is filled with another token, and no activation of it is used.

    Raises:
        ValueError: BOS or EOS, which every row or document gets, are beyond them.
    """
    if rows is None:
        return
    for name in ("bos_token", "eos_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and index >= rows:
            raise ValueError(f"model.tokenizer: its {name} {getattr(tokenizer, name)!r} {beyond(index, rows)}")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = None


def _stand_in(model: str, architecture: Any) -> NoTokenizer:
    text = architecture.get_text_config()
    special: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(text, name, None)
        special += found if isinstance(found, list) else [] if found is None else [found]
    return NoTokenizer(model, text.vocab_size, special)
