"""Hook points: where in a language model activations are read."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast, get_args

Hook = Literal["resid_pre", "resid_post", "mlp_out", "attn_out"]


class HookPoint(NamedTuple):
    """A place in a language model whose activations an SAE is trained on."""

    layer: int
    """Transformer block, counted from 0."""
    hook: Hook
    """Place within the block."""

    @property
    def name(self) -> str:
        """The name that TransformerLens uses."""
        return f"blocks.{self.layer}.hook_{self.hook}"

    @classmethod
    def of(cls, name: str) -> HookPoint:
        """The hook point with this TransformerLens name.

        Raises:
            ValueError: not a hook point that c2r supports.
        """
        found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", name)
        if found is None or found[2] not in get_args(Hook):
            raise ValueError(f"hook point: got {name!r}; expected blocks.N.hook_X with X one of {get_args(Hook)}")
        return cls(int(found[1]), cast(Hook, found[2]))
