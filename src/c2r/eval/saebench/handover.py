"""An SAE with the interface that SAEBench 0.6.0 expects, and patches for it to run with the libraries c2r requires.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn

from c2r.config.run import ModelConfig
from c2r.sae.model import SAE

_VERSIONS = "0.6."


def check_installed() -> str:
    """The version of the installed sae-bench.

    Raises:
        ValueError: it is not installed, or its version is not 0.6.
    """
    how = "pip install 'c2r[saebench]'"
    try:
        version = importlib.metadata.version("sae-bench")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"suites: saebench:… needs sae-bench, which is not installed; {how}") from None
    if not version.startswith(_VERSIONS):
        raise ValueError(f"suites: saebench:… needs sae-bench {_VERSIONS}x, but {version} is installed; {how}")
    return version


@dataclass
class HandedConfig:
    """The attributes that SAEBench reads from `sae.cfg`; it sets further ones itself."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None
    dtype: str
    architecture: str
    apply_b_dec_to_input: bool
    hook_head_index: int | None = None
    normalize_activations: str = "none"
    prepend_bos: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields above."""
        return asdict(self)


class HandedSAE(nn.Module):
    """An SAE with the attributes of SAEBench's custom SAEs (`sae_bench.custom_saes.base_sae`); `W_enc` is `[D, F]`.

    It is a copy, because SAEBench moves it to the language model's device and dtype.

    Arguments:
        model_name: SAEBench's name of the language model.
    """

    def __init__(self, sae: SAE, model: ModelConfig, model_name: str) -> None:
        super().__init__()
        self.sae = copy.deepcopy(sae)
        self.cfg = HandedConfig(
            model_name,
            sae.d_in,
            sae.width,
            model.layer,
            model.point.name,
            sae.config.get("metadata", {}).get("context_size"),
            str(sae.W_dec.dtype).removeprefix("torch."),
            sae.architecture,
            sae.subtract_b_dec,
            prepend_bos=sae.config.get("metadata", {}).get("prepend_bos") is not False,
        )

    @property
    def W_enc(self) -> Tensor:
        """Encoder weights `[D, F]`."""
        return self.sae.W_enc.T

    @property
    def W_dec(self) -> nn.Parameter:
        """Decoder weights `[F, D]`."""
        return self.sae.W_dec

    @property
    def b_enc(self) -> nn.Parameter:
        """Encoder bias `[F]`; for "gated" that of the gate."""
        return self.sae.b_enc

    @property
    def b_dec(self) -> nn.Parameter:
        """Decoder bias `[D]`."""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.sae.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Activations `[*B, F]` of x `[*B, D]`."""
        return self.sae.encode(x.to(self.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """x̂ `[*B, D]` of activations `[*B, F]`."""
        return self.sae.decode(feature_acts.to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x̂ of x."""
        return self.decode(self.encode(x))


@contextlib.contextmanager
def shapes_unchecked() -> Iterator[None]:
    """Disable sae-bench's run-time checks of shapes.

    Two annotations of its sparse probing contradict each other (`train_dataset_size` is the number of samples of one
    class in the caller, of two classes in the callee), which beartype rejects since it checks inside dictionaries.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def mended_ravel() -> Iterator[None]:
    """Patch RAVEL of sae-bench 0.6.0 so that it runs with transformers 5 and huggingface_hub 1.

    It expects decoder blocks to return a tuple, but those of transformers 5 return a tensor; and it passes
    `snapshot_download` a parameter that huggingface_hub 1 no longer has.
    """
    activations: Any = importlib.import_module("sae_bench.sae_bench_utils.activation_collection")
    instance: Any = importlib.import_module("sae_bench.evals.ravel.instance")
    find_block, download = activations.get_module, instance.snapshot_download

    def fetch(*args: Any, local_dir_use_symlinks: bool = False, **options: Any) -> str:
        return download(*args, **options)

    activations.get_module = lambda model, layer: _TupleBlock(find_block(model, layer))
    instance.snapshot_download = fetch
    try:
        yield
    finally:
        activations.get_module, instance.snapshot_download = find_block, download


class _TupleBlock:
    """A decoder block whose forward hooks always receive a tuple."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def register_forward_hook(self, hook: Callable[[Any, Any, Any], Any]) -> Any:
        def on_tuple(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return hook(module, inputs, output)
            changed = hook(module, inputs, (output,))
            return None if changed is None else changed[0]

        return self.block.register_forward_hook(on_tuple)
