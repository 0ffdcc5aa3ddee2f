"""Load the tokenizer of a language model, with a stand-in for models that have none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from c2r.text.tokenizing import beyond, special_ids

_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")


class NoTokenizer:
    """Stand-in for a model without a tokenizer: data of token ids can be read, text cannot.

    Nothing is added before, between or after the documents' ids. The ids that the model's configuration gives for BOS,
    EOS and padding count as special wherever they occur in the data.

    Arguments:
        model: name of the model, for errors.
        size: size of the vocabulary; ids are smaller.
        special: ids of special tokens.
    """

    bos_token_id = eos_token_id = pad_token_id = None
    chat_template = None

    def __init__(self, model: str, size: int, special: Iterable[int] = ()) -> None:
        self.model, self.size = model, size
        self.all_special_ids = sorted({index for index in special if 0 <= index < size})

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        """Each id `n` under the name `<n>`."""
        return {f"<{index}>": index for index in range(self.size)}

    def convert_ids_to_tokens(self, index: int) -> str:
        """The id as `<n>`."""
        return f"<{index}>"

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """The ids as `<n>`, concatenated."""
        return "".join(f"<{int(index)}>" for index in ids)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse text.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"model.tokenizer: {self.model!r} has no tokenizer, but text needs one; give a folder or a Hub id that "
            "has one, or use data of token ids (data.tokens_field)"
        )


def load_tokenizer(model: str, path: str, own: str | None, architecture: Any, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Arguments:
        model: name of the model, for errors.
        path: folder or Hub id of the model.
        own: folder or Hub id of the tokenizer; None: that of the model.
        architecture: the model's configuration.
        options: `revision` (of the model) and `trust_remote_code`.

    Returns:
        A Hugging Face tokenizer, or `NoTokenizer` for a model's folder without one.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    if own is not None:
        options["revision"] = None
    elif Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in _FILES):
        return _stand_in(model, architecture)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if own is None else own, **options)
    except Exception as error:  # many libraries read tokenizers, and they raise many types
        raise ValueError(
            f"model.tokenizer: cannot load the tokenizer of {own or model!r}; accepted are a folder or a Hub id that "
            f"has one: {error}"
        ) from error
    # If the files are missing, some classes create a tokenizer that has only special tokens.
    if set(tokenizer.get_vocab().values()) <= special_ids(tokenizer):
        if own is not None:
            raise ValueError(
                f"model.tokenizer: {own!r} has no tokenizer; accepted are a folder or a Hub id that has one"
            )
        return _stand_in(model, architecture)
    return tokenizer


def fit_tokenizer(tokenizer: Any, rows: int | None) -> None:
    """Check a tokenizer's special tokens against the number of rows of the model's embedding matrix.

    A padding token beyond the last row is removed; another token then fills padding, whose activations are never used.

    Raises:
        ValueError: BOS or EOS, which are added to every row or document, are beyond the last row.
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
