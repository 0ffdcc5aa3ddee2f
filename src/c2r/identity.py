"""Identities of text, tokenizers, models and code by their contents, recorded with every result and compared later.

An identity is a dict of JSON values. It contains no paths or names, so a folder may be moved, and a different file at
the same path is noticed.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

ACTIVATIONS = 1
"""Version number, increased when code changes alter the activations for the same text, tokenizer and model."""
_WHOLE, _PIECE, _CHUNK, _NUMBERS = 2**30, 2**18, 2**20, 2**24
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype")
"""Keys of a model's configuration that only say where it came from or how it was loaded."""
_FACTS = ("code", "files")
"""Parts of an identity that are recorded and not compared."""
_NOT_MAKERS = ("training", "report", "cli.py", "demo.py", "methods.py", "schedules.py", "step.py")


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, shapes, dtypes and all bits of the values, in order; independent of the device.

    Tensors on other devices are copied to the CPU in pieces of at most 2²⁴ numbers.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        for piece in _pieces(tensor.detach()):
            data: Any = piece.cpu().contiguous().view(torch.uint8).numpy()
            digest.update(data)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers in order, as flat pieces; a large non-contiguous tensor is split before it is copied."""
    if tensor.is_contiguous() or tensor.numel() <= _NUMBERS:
        yield from tensor.reshape(-1).split(_NUMBERS)
    else:
        for part in tensor:
            yield from _pieces(part)


def of_model(model: Any) -> str:
    """`configuration:weights` of a Hugging Face model: digests of its configuration and of its weights.

    Weights are the parameters (tied ones once) and the buffers saved with them. Of the configuration, only differences
    from its class's defaults count, without versions, paths and the precision of loading.
    """
    said = _without(json.loads(model.config.to_json_string()))
    text = json.dumps([type(model).__name__, said, _code_of(model)], sort_keys=True)
    saved = set(model.state_dict())
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    weights = of_tensors((*model.named_parameters(), *buffers))
    return f"{xxhash.xxh3_128_hexdigest(text.encode())}:{weights}"


def _without(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without(value) for key, value in node.items() if key not in _NOT_THE_MODEL}
    return [_without(value) for value in node] if isinstance(node, list) else node


def _code_of(model: Any) -> str:
    """Digest of the code shipped with a model; empty for classes of transformers or of the calling program."""
    module = sys.modules.get(type(model).__module__)
    if not type(model).__module__.startswith("transformers_modules.") or not getattr(module, "__file__", None):
        return ""
    assert module is not None
    return xxhash.xxh3_128_hexdigest(Path(str(module.__file__)).read_bytes())


def of_tokenizer(tokenizer: Any) -> str:
    """Digest of everything that determines a text's ids: vocabulary, merges, normalisation, special tokens, tokens
    added before a text (BOS), and the chat template.
    """
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # tokenizer.json without its beginning, the padding of the latest call
        text = backend.to_str()
        rules: Any = text[max(0, text.find('"added_tokens"')) :]
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    opening = tokenizer("a b")["input_ids"]
    parts = [rules, special, sorted(tokenizer.all_special_ids), opening, getattr(tokenizer, "chat_template", None)]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def of_files(paths: Sequence[Path]) -> str:
    """Number, total size and digest of the contents of files, in order; of the names only the endings count.

    Up to 1 GiB in total, files are read whole. Beyond that, 1 GiB is read in pieces of 256 KiB spread evenly over the
    files, including both ends of each: a change between pieces that keeps a file's size is then not noticed.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        stats = [path.stat() for path in paths]
        total, digest = sum(stat.st_size for stat in stats), xxhash.xxh3_128()
        for path, stat in zip(paths, stats, strict=True):
            pieces = 0 if total <= _WHOLE else max(2, _WHOLE * stat.st_size // total // _PIECE)
            ending = "".join(path.suffixes[-2:] if path.suffix in (".gz", ".zst") else path.suffixes[-1:])
            found = _of_file(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, pieces)
            digest.update(f"{ending} {stat.st_size} {found};".encode())
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    return f"{len(paths)} file{'s'[: len(paths) != 1]} of {total:,} bytes, {digest.hexdigest()[:20]}"


@functools.lru_cache(maxsize=1_000_000)
def _of_file(path: str, size: int, modified: int, changed: int, pieces: int) -> str:
    """Digest of a file: of the whole (`pieces` = 0) or of that many pieces; cached until the file is written to."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        if pieces == 0 or pieces * _PIECE >= size:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        else:
            for number in range(pieces):
                file.seek(number * (size - _PIECE) // (pieces - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def of_folder(folder: Path) -> dict[str, str]:
    """Digest of each file in a model's folder that defines the model, without subfolders.

    Large files in the Hub's cache are not read, since their names are already hashes of their contents.
    """
    endings = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py", ".tiktoken")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(endings) and path.is_file():
            real, stat = path.resolve(), path.stat()
            stored = real.parent.name == "blobs" and len(real.name) >= 40
            found[path.name] = (
                f"blob {real.name}"
                if stored
                else _of_file(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, 0)
            )
    return found


@functools.cache
def versions() -> dict[str, str]:
    """Versions of c2r and of the libraries that affect results: recorded for information, never compared."""
    from c2r.version import __version__

    found = {"c2r": __version__}
    for package in ("torch", "transformers", "tokenizers", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": sys.version.split()[0], "source": source_digest()[:16]}


@functools.cache
def source_digest() -> str:
    """Digest of c2r's source code without training, reports and the command line: the code that evaluations run."""
    root, digest = Path(__file__).parent, xxhash.xxh3_128()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in _NOT_MAKERS:
            digest.update(f"{name.as_posix()};".encode() + path.read_bytes())
    return digest.hexdigest()


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any], there: str, here: str) -> list[str]:
    """One line per part in which two identities differ; parts that only one of them has, and `_FACTS`, are ignored."""
    lines = []
    for part in (part for part in recorded if part in found and part not in _FACTS):
        before, now = ({part: of} if not isinstance(of, dict) else of for of in (recorded[part], found[part]))
        for key in {**before, **now}:
            name = part if key == part else f"{part}.{key}"
            if before.get(key) != now.get(key):
                lines.append(f"{name}: {there} {_shown(before.get(key))}, {here} {_shown(now.get(key))}")
    return lines


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:16] if len(text) == 32 and " " not in text else text
