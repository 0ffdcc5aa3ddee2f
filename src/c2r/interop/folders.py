"""Recognises folders that are not SAE folders of c2r or SAELens, for helpful error messages."""

from __future__ import annotations

import json
from pathlib import Path

from c2r.layout import SAE_CONFIG, SAE_WEIGHTS

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_FAMILIES = (
    (("sae.safetensors",), "sparsify (EleutherAI)"),
    (("ae.pt", "config.json"), "dictionary_learning"),
    (("params.npz",), "Gemma Scope"),
    (("params.safetensors",), "Gemma Scope 2"),
    (("hyperparams.json",), "Llama Scope"),
    (("config.yaml", "layer_0.safetensors"), "circuit-tracer"),
)
"""Files that identify another library's folder, and the library's name."""
_SHOWN = 8


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle file, whatever its name, since opening it can execute code.

    Raises:
        ValueError: the file is a pickle.
    """
    # A safetensors file begins with its header's length (8 bytes, upper ones 0), then the header ("{").
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:] != b"{":
        raise ValueError(_said_of_pickle(path))


def check_folder(folder: Path) -> None:
    """Check that the two files of an SAE folder exist.

    Raises:
        ValueError: they do not; says what the folder contains, and which library wrote it if that is recognised.
    """
    if folder.is_file():
        raise ValueError(
            f"{folder}: not an SAE folder but a file; give the folder that contains {SAE_CONFIG} and {SAE_WEIGHTS}"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: not an SAE folder; there is no such folder")
    missing = [name for name in (SAE_CONFIG, SAE_WEIGHTS) if not (folder / name).is_file()]
    if not missing:
        return
    for marks, family in _FAMILIES:
        if all((folder / mark).is_file() for mark in marks):
            raise ValueError(
                f"{folder}: recognised as a folder of {family}, which c2r cannot read yet; accepted are folders of c2r "
                f"and SAELens, with {SAE_CONFIG} and {SAE_WEIGHTS}"
            )
    files = sorted(path.name for path in folder.iterdir())
    for name in files:
        if SAE_WEIGHTS in missing and Path(name).suffix in _PICKLES:
            raise ValueError(_said_of_pickle(folder / name))
    inside = [name for name in files if (folder / name / SAE_CONFIG).is_file()]
    if inside:
        raise ValueError(
            f"{folder}: not an SAE folder; it contains {len(inside)} SAE folders, give one of them: {_listed(inside)}"
        )
    raise ValueError(
        f"{folder}: not an SAE folder; it has no {' and no '.join(missing)}; it contains {_listed(files) or 'nothing'}"
    )


def family_of_config(raw: object) -> str | None:
    """Name of the library that wrote this `cfg.json`, if recognised as another than SAELens; otherwise None."""
    if isinstance(raw, dict) and "architecture" not in raw and "d_sae" not in raw and "num_latents" in raw:
        return "sparsify (EleutherAI)"
    return None


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        ValueError: the file is corrupt.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.parent}: corrupt SAE folder: {path.name}: {error}") from error


def _said_of_pickle(path: Path) -> str:
    return f"{path.parent}: {path.name} is a pickle, which can execute code, and was not opened; c2r reads safetensors"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
