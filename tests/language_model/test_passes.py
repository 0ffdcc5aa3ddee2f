"""Passes that start at the hook, with the head on pieces, against whole passes; and how often each part is computed."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from builders import CONFIGS, GATED, SHARED
from c2r.language_model import passes as passes_module
from c2r.language_model.model import LanguageModel
from c2r.language_model.passes import Passes
from c2r.text.packing import Rows

KV = {"intermediate_size": 24, "num_key_value_heads": 2}
SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3}
FAMILIES: dict[str, Any] = CONFIGS | {
    # logits scaled, by multiplication and division
    "cohere": lambda: transformers.CohereConfig(**SHARED, **KV, logit_scale=0.3),
    "granite": lambda: transformers.GraniteConfig(**SHARED, **KV, residual_multiplier=0.22, logits_scaling=3.0),
    # sums into the hook's output in place
    "falcon": lambda: transformers.FalconConfig(**SMALL, num_attention_heads=2, alibi=False),
    "bloom": lambda: transformers.BloomConfig(vocab_size=300, hidden_size=16, n_layer=3, n_head=2),
    "phi": lambda: transformers.PhiConfig(**SHARED, **KV),
    # does not call its own submodule that holds the blocks
    "opt": lambda: transformers.OPTConfig(
        **SMALL, num_attention_heads=2, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SHARED, **KV, num_experts=2, num_experts_per_tok=1),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHARED, **GATED, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=5.0
    ),
    "mamba": lambda: transformers.MambaConfig(**SMALL, state_size=4),
}
REFUSED = {
    ("mamba", "attn_out"),
    ("mamba", "mlp_out"),
    ("opt", "mlp_out"),
    ("granite", "attn_out"),
    ("granite", "mlp_out"),
}
"""Blocks in which no part outputs what is added to the residual stream."""
IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))
SCORED = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) < 0.7


def language_model(family: str, hook: Any = "resid_post", layer: int = 1) -> LanguageModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.3)
    return LanguageModel(model, None, layer=layer, hook=hook)


def logits_of(passes: Passes, change: Any) -> tuple[Tensor, Tensor]:
    """Logits at the scored positions, of the clean pass and of one with a changed hook output."""
    first = passes.read(IDS, SCORED)
    finals = first.clean, first.final(change(first.hidden_RTD))
    clean, changed = (torch.cat([logits(final) for _, logits in first.pieces()]) for final in finals)
    return clean, changed


def change(hidden: Tensor) -> Tensor:
    return hidden.flip(-1) * 0.8


def check(lm: LanguageModel, passes: Passes) -> None:
    """Both passes reproduce the model's logits."""
    clean, changed = logits_of(passes, change)
    torch.testing.assert_close(clean, lm.model(IDS, use_cache=False).logits[SCORED], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(changed, lm.logits(IDS, change)[SCORED], rtol=1e-5, atol=1e-5)
    assert (clean - changed).abs().max() > 1e-2


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use pieces of five positions."""
    monkeypatch.setattr(passes_module, "_PIECE", {"cpu": 5 * 300})
    monkeypatch.setattr(passes_module, "_SMALLEST_PIECE", 1)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("hook", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_whole_passes(family: str, hook: str) -> None:
    try:
        lm = language_model(family, hook)
    except ValueError:
        assert (family, hook) in REFUSED
        return
    passes = Passes(lm, IDS)
    assert passes.notes == []
    assert passes.skips
    assert passes.in_pieces
    check(lm, passes)


@pytest.mark.parametrize(("layer", "hook"), [(0, "resid_pre"), (0, "resid_post"), (2, "resid_post")])
def test_the_first_and_the_last_hook_point(layer: int, hook: str) -> None:
    lm = language_model("llama", hook, layer)
    passes = Passes(lm, IDS)
    assert passes.notes == []
    assert passes.skips == ((layer, hook) != (0, "resid_pre"))
    check(lm, passes)


def test_half_precision() -> None:
    lm = language_model("gemma2")
    lm.model.to(torch.bfloat16)
    passes = Passes(lm, IDS)
    assert passes.notes == []
    clean, changed = logits_of(passes, change)
    torch.testing.assert_close(clean, lm.logits(IDS)[SCORED], rtol=0, atol=0.02)
    torch.testing.assert_close(changed, lm.logits(IDS, change)[SCORED], rtol=0, atol=0.02)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("hook", "first"), [("resid_post", 2), ("resid_pre", 1), ("mlp_out", 1)])
def test_blocks_before_the_hook_run_once_and_the_head_on_pieces(hook: str, first: int) -> None:
    lm = language_model("llama", hook)
    passes = Passes(lm, IDS)
    ran, rows = Counter[int](), []
    for number, block in enumerate(lm.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.update([number]))  # pyright: ignore[reportAttributeAccessIssue]
    lm.model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    logits_of(passes, change)
    assert ran == {number: 1 if number < first else 2 for number in range(3)}
    assert max(rows) == 5
    assert sum(rows) == 2 * int(SCORED.sum())


class Widest(TorchDispatchMode):
    """Records the maximum number of rows of V numbers returned by any operation."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:  # a view of weights
            return found
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return found


@pytest.mark.usefixtures("small_pieces")
def test_logits_of_all_positions_are_never_in_memory() -> None:
    lm = language_model("gemma2")
    passes = Passes(lm, IDS)
    with Widest(300) as pieces:
        logits = [logits(final) for first in [passes.read(IDS, SCORED)] for final in [first.clean]
                  for _, logits in first.pieces()]  # fmt: skip
    assert pieces.rows == 5
    assert sum(map(len, logits)) == SCORED.sum()
    with Widest(300) as whole:
        lm.logits(IDS)
    assert whole.rows == IDS.numel()  # the measure can see it


def later_block_reads_an_earlier_one(lm: LanguageModel, left: dict[str, Any]) -> None:
    """The last block adds what the first block's MLP computed in this pass."""
    lm.blocks[0].mlp.register_forward_hook(lambda _, __, output: left.__setitem__("x", output))  # pyright: ignore[reportAttributeAccessIssue]
    lm.blocks[2].mlp.register_forward_hook(lambda _, __, output: output + left["x"])  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("missing", ["raises", "differs"])
def test_a_model_whose_later_blocks_read_earlier_ones_runs_whole(missing: str) -> None:
    lm, left = language_model("llama"), {}
    later_block_reads_an_earlier_one(lm, left)

    def start(*_: Any) -> None:
        left.clear()
        if missing == "differs":
            left["x"] = torch.zeros(())

    lm.model.model.embed_tokens.register_forward_hook(start)
    passes = Passes(lm, IDS)
    assert not passes.skips
    assert passes.in_pieces
    (note,) = passes.notes
    assert "LlamaForCausalLM cannot be run from the hook onwards" in note
    assert ("KeyError" if missing == "raises" else "logits differ by") in note
    assert "first 2 blocks" in note
    check(lm, passes)


def test_a_head_that_looks_at_positions_gets_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    lm.model.lm_head.register_forward_hook(
        lambda _, __, output: output + torch.arange(output.shape[1])[:, None] * torch.arange(300) / 300
    )
    passes = Passes(lm, IDS)
    assert not passes.in_pieces
    assert passes.skips
    (note,) = passes.notes
    assert "output head of LlamaForCausalLM" in note
    check(lm, passes)
    monkeypatch.setattr(passes_module, "_WHOLE", 2 * 12 * 300)
    parts = list(passes.cut([Rows(IDS, SCORED)]))
    assert [len(part.ids) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.ids for part in parts]), IDS)
    assert torch.equal(torch.cat([part.real for part in parts]), SCORED)


def test_the_model_is_left_as_it_was() -> None:
    lm = language_model("gpt2")
    before = lm.model(IDS).logits
    passes = Passes(lm, IDS)
    logits_of(passes, change)
    assert torch.equal(lm.model(IDS).logits, before)
    assert not any("forward" in vars(module) for module in lm.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_a_forward_of_the_objects_own_comes_back() -> None:
    """As set by libraries that move weights between devices."""
    lm = language_model("llama")
    block = lm.blocks[0]
    own = block.forward
    block.forward = own
    logits_of(Passes(lm, IDS), change)
    assert vars(block)["forward"] is own
