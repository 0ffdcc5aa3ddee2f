"""Where in a language model activations are read."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast, get_args

Hook = Literal["resid_pre", "resid_post", "mlp_out", "attn_out"]


class HookPoint(NamedTuple):
    """A place in a language model whose activations are learnt."""

    layer: int
    """Block, counted from 0."""
    hook: Hook

    @property
    def name(self) -> str:
        """In the field's (TransformerLens's) words."""
        return f"blocks.{self.layer}.hook_{self.hook}"

    @classmethod
    def of(cls, name: str) -> HookPoint:
        """The hook point of such a name.

        Raises:
            ValueError: the name is none of ours.
        """
        found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", name)
        if found is None or found[2] not in get_args(Hook):
            raise ValueError(f"hook point: got {name!r}; expected blocks.N.hook_X, X being one of {get_args(Hook)}")
        return cls(int(found[1]), cast(Hook, found[2]))
