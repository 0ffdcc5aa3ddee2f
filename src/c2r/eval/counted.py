"""The tokens of an evaluation's text that count for one SAE; the rule is `c2r.activations.counting`'s.

n tokens of the text · k tokens of it that count · D width of the activations.
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
    """A text as one SAE is measured on it."""

    text: TextActivations
    """All of it, to be read."""
    count_n: Tensor
    """Bool: which tokens count."""
    place_k: Tensor
    """Where in the text these stand."""
    left_out: LeftOut

    @property
    def x_kD(self) -> Tensor:
        """Activations of the tokens that count; no copy where all do."""
        return self.text.x_nD[self.place_k] if self.left_out.outliers else self.text.x_nD


def counted(bench: Bench, name: str, sae: SAE) -> Counted:
    """The bench's text for one SAE, by the rule in the SAE's own file; says once what is left out.

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
        ValueError: all of them are.
    """
    if left_out.tokens and left_out.outliers == left_out.tokens:
        raise ValueError(
            f"{left_out}: nothing is left to measure; is this the model, hook point and scale that the SAE was "
            "trained on?"
        )
    if left_out.outliers:
        console.print(f"[yellow]{escape(name)}: {left_out}[/]", highlight=False)
