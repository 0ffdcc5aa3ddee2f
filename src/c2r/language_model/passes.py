"""Several passes of a language model over the same rows that differ only in the hook's output.

The blocks before the hook are computed once per batch of rows. The output head, which computes one logit per position
and vocabulary entry, runs on a few positions at a time. Both work on any Hugging Face causal language model without
knowledge of its architecture, because every pass calls the model's own `forward`:

- blocks before the hook are replaced by ones that return the output of the last of them in the first pass; the model
  computes masks, positions, embeddings and all other inputs of its blocks as usual;
- for the head, the submodule that contains the blocks (the trunk) is replaced by one that returns given final states;
  the model applies its own code to them (output embedding, scaling, soft cap).

Both are tested on the first tokens. If a test fails, whole passes are run instead, with the same results.

R rows · T positions of a row · D width at the hook · E width of the head's input · V vocabulary · n scored positions ·
p positions of a piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from c2r.language_model.model import LanguageModel
from c2r.text.packing import Rows

_PIECE = {"cpu": 2**23}
"""Maximum number of logits at once, by device type: 32 MiB in fp32 on a CPU, to nearly fit into its caches."""
_PIECE_ELSEWHERE = 2**26
_SMALLEST_PIECE = 16
_WHOLE = 2**26
"""Maximum number of logits at once if a model's head cannot run on pieces."""
_TRIAL = (2, 16)
"""Rows and positions used in the tests."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_OF_HALF = 0.02
"""Tolerance for logits in the tests, relative to the largest. The computation is the same, so differences come only
from kernels that sum in a different order."""


class _AtHead(Exception):
    """Raised to end a forward pass before the head."""


class Passes:
    """A language model prepared for several passes over each batch of rows.

    Arguments:
        lm: the language model with its hook point.
        ids_RT: some of the rows that will be read; the tests use a few of their tokens.
    """

    def __init__(self, lm: LanguageModel, ids_RT: Tensor) -> None:
        self.lm = lm
        self.notes: list[str] = []
        """Sentences for the user: which savings are not possible with this model, and why."""
        self._before = list(lm.blocks)[: lm.layer + (lm.hook == "resid_post")]
        self._head: tuple[nn.Module, Callable[[Tensor], Any]] | None = None
        """The trunk, whose output the head reads, and a function that wraps states as such an output."""
        few_RT = ids_RT[: _TRIAL[0], : _TRIAL[1]].to(lm.device)
        expected = lm.logits(few_RT), lm.logits(few_RT, _changed)
        self._vocabulary = expected[0].shape[-1]
        self._test_head(few_RT, expected[0])
        self._test_skipping(few_RT, expected)

    @property
    def skips(self) -> bool:
        """Whether the blocks before the hook are computed only once per batch."""
        return bool(self._before)

    @property
    def in_pieces(self) -> bool:
        """Whether the head runs on pieces."""
        return self._head is not None

    def cut(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """Split batches, if logits must be computed for whole rows, so that they fit into memory."""
        for part in batches:
            most = len(part.ids)
            if not self.in_pieces:
                most = max(1, _WHOLE // (part.ids.shape[1] * self._vocabulary))
            for start in range(0, len(part.ids), most):
                yield Rows(part.ids[start : start + most], part.real[start : start + most])

    def read(self, ids_RT: Tensor, scored_RT: Tensor) -> Pass:
        """The first pass over rows, with the hook's output unchanged.

        Arguments:
            scored_RT: bool, positions at which logits are needed.
        """
        return Pass(self, ids_RT.to(self.lm.device), scored_RT.to(self.lm.device))

    def _piece(self) -> int:
        """p, the number of positions whose logits are computed at once."""
        most = _PIECE.get(self.lm.device.type, _PIECE_ELSEWHERE)
        return max(_SMALLEST_PIECE, most // self._vocabulary)

    def _forward(self, ids_RT: Tensor, replace: Callable[[Tensor], Tensor], saved: Any) -> Tensor:
        """The head's input `[R, T, E]`, or fp32 logits `[R, T, V]` if the head cannot run on pieces.

        Arguments:
            saved: output of the last block before the hook; None: run the blocks.
        """
        with contextlib.ExitStack() as stack:
            if saved is not None:
                for block in self._before:
                    stack.enter_context(_replaced(block, lambda *_, **__: _copied(saved)))
            if self._head is None:
                return self.lm.logits(ids_RT, replace)
            return _hidden(self._output_of(self._head[0], ids_RT, replace))

    def _output_of(self, trunk: nn.Module, ids_RT: Tensor, replace: Callable[[Tensor], Tensor]) -> Any:
        """The output of `trunk` in a pass, which ends there."""
        seen: list[Any] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output)
            raise _AtHead

        handle = trunk.register_forward_hook(keep)
        try:
            with self.lm.replacing(replace), contextlib.suppress(_AtHead):
                self.lm.model(input_ids=ids_RT, use_cache=False)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"the model does not call its {type(trunk).__name__} as a module")
        return seen[0]

    def head(self, final_pE: Tensor) -> Tensor:
        """Logits, fp32 `[p, V]`, of final states `[p, E]`."""
        assert self._head is not None
        trunk, output_of = self._head
        output = output_of(final_pE[None])
        ids_1p = torch.zeros(1, len(final_pE), dtype=torch.long, device=final_pE.device)
        with _replaced(trunk, lambda *_, **__: output):
            return self.lm.model(input_ids=ids_1p, use_cache=False).logits[0].float()

    def _test_head(self, few_RT: Tensor, expected_RTV: Tensor) -> None:
        """Find a trunk with which the head, run on pieces, reproduces the model's logits."""
        reason = "no submodule contains all of its blocks"
        for trunk in _holding_blocks(self.lm):
            try:
                output = self._output_of(trunk, few_RT, _same)
                self._head = trunk, partial(_with_hidden, output)
                final_nE = _hidden(output).flatten(0, 1)
                found_nV = torch.cat([self.head(final_pE) for final_pE in final_nE.split(len(final_nE) // 2 + 1)])
                reason = self._difference([found_nV], [expected_RTV.flatten(0, 1)])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if not reason:
                return
        self._head = None
        self.notes.append(
            f"the output head of {type(self.lm.model).__name__} cannot be run on a few positions ({reason}): logits "
            "are computed for whole rows, which takes more memory and time"
        )

    def _test_skipping(self, few_RT: Tensor, expected: tuple[Tensor, Tensor]) -> None:
        """Turn skipping off unless passes that start at the hook reproduce the model's logits."""
        if not self._before:
            return
        try:
            scored_RT = torch.ones_like(few_RT, dtype=torch.bool)
            first = self.read(few_RT, scored_RT)
            finals = [first.final(first.hidden_RTD), first.final(_changed(first.hidden_RTD))]
            found = [torch.cat([logits(final) for _, logits in first.pieces()]) for final in finals]
            reason = self._difference(found, [logits_RTV.flatten(0, 1) for logits_RTV in expected])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            skipped, self._before = len(self._before), []
            self.notes.append(
                f"{type(self.lm.model).__name__} cannot be run from the hook onwards ({reason}): its first {skipped} "
                "blocks are recomputed for every pass, which takes longer"
            )

    def _difference(self, found: list[Tensor], expected: list[Tensor]) -> str:
        """How the logits differ, in words; empty if they agree."""
        tolerance = _TOLERANCE.get(next(self.lm.model.parameters()).dtype, _TOLERANCE_OF_HALF)
        for mine, theirs in zip(found, expected, strict=True):
            scale = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
            if not torch.allclose(mine, theirs, rtol=0, atol=tolerance * scale, equal_nan=True):
                return f"logits differ by {(mine - theirs).abs().max().item() / max(scale, 1e-30):.1e} of the largest"
        return ""


class Pass:
    """Rows after their first pass; further passes start at the hook.

    `hidden_RTD` is the hook's output, in the model's precision, and `clean` the final state of the first pass.
    """

    def __init__(self, passes: Passes, ids_RT: Tensor, scored_RT: Tensor) -> None:
        self.passes, self.ids_RT, self.scored_RT = passes, ids_RT, scored_RT
        self._saved: Any = None
        seen: list[Tensor] = []

        def look(hidden_RTD: Tensor) -> Tensor:
            seen.append(hidden_RTD.clone())  # some models change it in place
            return hidden_RTD

        with self._saving():
            whole = passes._forward(ids_RT, look, None)
        self.hidden_RTD = seen[0]
        self.clean = self._kept(whole)

    def final(self, hidden_RTD: Tensor) -> Tensor:
        """The final state of a pass in which the hook emits `hidden_RTD`; `pieces` computes logits from it."""
        return self._kept(self.passes._forward(self.ids_RT, lambda _: hidden_RTD.clone(), self._saved))

    def pieces(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """Pieces of the n scored positions, each with a function from a final state to fp32 logits `[p, V]` there."""
        count = int(self.scored_RT.sum())
        if not self.passes.in_pieces:
            yield slice(0, count), lambda logits_nV: logits_nV
            return
        size = self.passes._piece()
        for start in range(0, count, size):
            piece = slice(start, min(start + size, count))
            yield piece, lambda final_nE, piece=piece: self.passes.head(final_nE[piece])

    def _kept(self, whole_RTE: Tensor) -> Tensor:
        return whole_RTE[self.scored_RT]

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Store the output of the last block before the hook."""
        before = self.passes._before
        if not before:
            yield
            return

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._saved = _copied(output)

        handle = before[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def _holding_blocks(lm: LanguageModel) -> Iterator[nn.Module]:
    """The callable submodules that contain all blocks, largest first."""
    module, blocks = lm.model, set(lm.blocks)
    while True:
        holding = [child for child in module.children() if blocks <= set(child.modules())]
        if not holding or isinstance(holding[0], (nn.ModuleList, nn.Sequential)) or holding[0] in blocks:
            return
        module = holding[0]
        yield module


def _hidden(output: Any) -> Tensor:
    """The states in a trunk's output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output["last_hidden_state"]


def _with_hidden(output: Any, hidden_1pE: Tensor) -> Any:
    """A trunk's output with its states replaced by these."""
    if isinstance(output, Tensor):
        return hidden_1pE
    if isinstance(output, tuple):
        return (hidden_1pE, *output[1:])
    return type(output)(**(dict(output) | {"last_hidden_state": hidden_1pE}))


def _copied(output: Any) -> Any:
    """A block's output with its states copied, since the model may change them in place."""
    return output.clone() if isinstance(output, Tensor) else (output[0].clone(), *output[1:])


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context manager that replaces the module's `forward`."""
    own = module.__dict__.get("forward")  # set on the instance by some libraries
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _changed(hidden: Tensor) -> Tensor:
    return hidden.roll(1, -1)
