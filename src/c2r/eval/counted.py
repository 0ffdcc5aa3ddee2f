"""The tokens of an evaluation's text that count for one SAE, by the rule in `c2r.activations.counting`.

n tokens of the text · k tokens that count · D width of the activations.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from c2r.activations.counting import LeftOut, counting_of
from c2r.eval.bench import Bench, TextActivations
from c2r.sae.model import SAE


class Counted(NamedTuple):
    """A text and which of its tokens count for one SAE."""

    text: TextActivations
    """All tokens, including those that do not count."""
    count_n: Tensor
    """Bool: which tokens count."""
    place_k: Tensor
    """Indices of the tokens that count."""
    left_out: LeftOut

    @property
    def x_kD(self) -> Tensor:
        """Activations of the tokens that count; not copied if all of them count."""
        return self.text.x_nD[self.place_k] if self.left_out.outliers else self.text.x_nD


def counted(bench: Bench, name: str, sae: SAE) -> Counted:
    """The bench's text for one SAE, by the rule in the SAE's `cfg.json`; prints once how many tokens are left out.

    Raises:
        ValueError: no token counts.
    """
    if name not in bench.counted:
        text, rule = bench.activations, counting_of(sae.config)
        count_n = rule.of(text.x_nD)
        left_out = LeftOut(rule, len(count_n), int((~count_n).sum()))
        say_left_out(bench.console, name, left_out)
        bench.counted[name] = Counted(text, count_n, count_n.nonzero().squeeze(1), left_out)
    return bench.counted[name]


def say_left_out(console: Console, name: str, left_out: LeftOut) -> None:
    """Print how many tokens are left out, if any.

    Raises:
        ValueError: all tokens are left out.
    """
    if left_out.tokens and left_out.outliers == left_out.tokens:
        raise ValueError(
            f"{left_out}: no token is left to evaluate on. Is this the model, hook point and scale that the SAE was "
            "trained on?"
        )
    if left_out.outliers:
        console.print(f"[yellow]{escape(name)}: {left_out}[/]", highlight=False)
