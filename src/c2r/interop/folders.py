"""What a folder that is no SAE folder of ours or SAELens's may be instead, for an error that helps."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_FAMILIES = (
    (("sae.safetensors",), "sparsify (EleutherAI)"),
    (("ae.pt", "config.json"), "dictionary_learning"),
    (("params.npz",), "Gemma Scope"),
    (("params.safetensors",), "Gemma Scope 2"),
    (("hyperparams.json",), "Llama Scope"),
    (("config.yaml", "layer_0.safetensors"), "circuit-tracer"),
)
"""Files by which folders of others are known, and whose they are."""
_SHOWN = 8


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle in place of the weights, whatever it is called: opening one can run code.

    Raises:
        ValueError: it is one.
    """
    # safetensors opens with the length of its header, whose upper bytes are 0, and then with the header.
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:] != b"{":
        raise ValueError(_said_of_pickle(path))


def check_folder(folder: Path) -> None:
    """Find the two files of an SAE folder.

    Raises:
        ValueError: they are not there; says what is, and whose folder it is if that can be seen.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: not an SAE folder but a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: not an SAE folder; there is no such folder")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if not missing:
        return
    for marks, family in _FAMILIES:
        if all((folder / mark).is_file() for mark in marks):
            raise ValueError(
                f"{folder}: recognised as a folder of {family}; reading these is not supported yet. Read are folders "
                f"of c2r and SAELens: {CONFIG} and {WEIGHTS}"
            )
    files = sorted(path.name for path in folder.iterdir())
    for name in files:
        if WEIGHTS in missing and Path(name).suffix in _PICKLES:
            raise ValueError(_said_of_pickle(folder / name))
    inside = [name for name in files if (folder / name / CONFIG).is_file()]
    if inside:
        raise ValueError(f"{folder}: not an SAE folder; it holds {len(inside)}, give one of them: {_listed(inside)}")
    raise ValueError(
        f"{folder}: not an SAE folder; it has no {' and no '.join(missing)}; found {_listed(files) or 'nothing'}"
    )


def family_of_config(raw: object) -> str | None:
    """Whose `cfg.json` this is, where it is not SAELens's."""
    if isinstance(raw, dict) and "architecture" not in raw and "d_sae" not in raw and "num_latents" in raw:
        return "sparsify (EleutherAI)"
    return None


def read_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.parent}: damaged SAE folder: {path.name}: {error}") from error


def _said_of_pickle(path: Path) -> str:
    return f"{path.parent}: {path.name} is a pickle, which could run code and was not opened; c2r reads safetensors"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
