"""Hook points of many model families: blocks and parts match what the model computes; others are rejected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from builders import GATED, SHARED, run_config, tiny_tokenizer
from c2r.activations.reader import live_reader
from c2r.config.hooks import HookPoint
from c2r.config.run import ModelConfig
from c2r.language_model.model import LanguageModel, load_language_model

PLAIN = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
GROUPED = {"intermediate_size": 24, "num_key_value_heads": 2}
PARTS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=300, hidden_size=16, n_layer=3, n_head=2),
    "glm4": lambda: transformers.Glm4Config(**SHARED, **GATED),
    "mpt": lambda: transformers.MptConfig(vocab_size=300, d_model=16, n_layers=3, n_heads=2, max_seq_len=64),
    "falcon": lambda: transformers.FalconConfig(**PLAIN, alibi=False),
    "phi": lambda: transformers.PhiConfig(**SHARED, **GROUPED),
    "stablelm": lambda: transformers.StableLmConfig(**SHARED, **GROUPED, use_parallel_residual=True),
    "mixtral": lambda: transformers.MixtralConfig(**SHARED, **GATED, num_local_experts=2, num_experts_per_tok=1),
    "lfm2": lambda: transformers.Lfm2Config(**SHARED, **GROUPED, layer_types=["full_attention"] * 3),
    "granite, multiplier 1": lambda: transformers.GraniteConfig(**SHARED, **GROUPED, residual_multiplier=1.0),
}


def granite() -> Any:
    return transformers.GraniteConfig(**SHARED, **GROUPED, residual_multiplier=0.22)


def made(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """A random model whose blocks have an effect and whose norms are not the identity."""
    torch.manual_seed(0)
    model = kind.from_config(config) if kind is transformers.AutoModelForCausalLM else kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.float().eval()


def ids_of(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def lm_of(config: Any, layer: int = 1, hook: Any = "resid_post") -> LanguageModel:
    return LanguageModel(made(config), None, layer=layer, hook=hook)


def points(layer: int) -> dict[str, HookPoint]:
    return {hook: HookPoint(layer, hook) for hook in ("resid_pre", "attn_out", "mlp_out", "resid_post")}


# Parts of a block


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_parts_are_what_the_block_adds(family: str, layer: int) -> None:
    lm, ids = lm_of(PARTS[family]()), ids_of()
    states = lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    at = points(layer)
    seen = lm.activations_at(ids, list(at.values()))
    torch.testing.assert_close(seen[at["resid_pre"]], states[layer])
    torch.testing.assert_close(seen[at["resid_post"]], states[layer + 1])
    added = seen[at["attn_out"]] + seen[at["mlp_out"]]
    torch.testing.assert_close(added, states[layer + 1] - states[layer], rtol=1e-4, atol=1e-4)


def test_blooms_attention_is_without_the_residual_stream() -> None:
    lm, ids = lm_of(PARTS["bloom"]()), ids_of()
    whole: list[Tensor] = []  # BLOOM's attention module returns the residual stream plus its output
    lm.model.transformer.h[1].self_attention.register_forward_hook(lambda *call: whole.append(call[2][0].clone()))
    at = points(1)
    seen = lm.activations_at(ids, [at["resid_pre"], at["attn_out"], at["resid_post"]])
    torch.testing.assert_close(seen[at["attn_out"]], whole[-1] - seen[at["resid_pre"]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_that_is_multiplied_is_refused_with_how_far_it_is_off(hook: Any, dtype: torch.dtype) -> None:
    model = made(granite()).to(dtype)
    # The parts output 1 / 0.22 times what the block adds, so they are off by 355% of that.
    with pytest.raises(ValueError, match=rf"got .{hook}., but no part .* is off by 35[3456]% .* can be used"):
        LanguageModel(model, None, layer=1, hook=hook)
    LanguageModel(model, None, layer=1, hook="resid_post")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["glm4", "bloom", "phi"])
def test_rounding_is_no_reason_to_refuse(family: str, dtype: torch.dtype) -> None:
    for hook in ("attn_out", "mlp_out"):
        exact = LanguageModel(made(PARTS[family]()), None, layer=1, hook=hook)
        rounded = LanguageModel(made(PARTS[family]()).to(dtype), None, layer=1, hook=hook)
        names = [[name for name, module in lm.model.named_modules() if module is lm._module] for lm in (exact, rounded)]
        assert names[0] == names[1]


@pytest.mark.parametrize(
    ("config", "hook", "says"),
    [
        (lambda: transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=3, state_size=4),
         "attn_out", r"but MambaBlock has no such part \(it has norm, mixer\)"),
        (lambda: transformers.OPTConfig(**PLAIN, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
         "mlp_out", "is the output of fc2 in OPTDecoderLayer, but that does not have the shape"),
        (lambda: transformers.BertConfig(**PLAIN, intermediate_size=24, is_decoder=True), "attn_out", "is off by"),
    ],
)  # fmt: skip
def test_blocks_without_such_a_part_are_refused(config: Callable[[], Any], hook: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.hook: got '{hook}', .*{says}.* resid_post can be used"):
        lm_of(config(), hook=hook)


def test_an_saes_own_hook_is_checked_before_anything_is_read(tmp_path: Path, corpus: Path) -> None:
    made(granite()).save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    saes = [{"name": "a", "width": 32, "k": 4}, {"name": "b", "width": 32, "k": 4, "hook": "mlp_out"}]
    config = run_config(tmp_path / "run", tmp_path / "lm", corpus, saes=saes)
    with pytest.raises(ValueError, match=r"saes\.b: model\.hook: got 'mlp_out', but no part of GraniteDecoderLayer"):
        live_reader(config, load_language_model(config.model))


# What the model changes in place


def test_points_read_together_are_as_they_are_alone_although_falcon_adds_in_place() -> None:
    lm, ids = lm_of(PARTS["falcon"]()), ids_of()
    at = [point for layer in (0, 1) for point in points(layer).values()]
    together = lm.activations_at(ids, at)
    for point in at:
        assert torch.equal(together[point], lm.activations_at(ids, [point])[point])


def test_what_a_replacement_keeps_and_gives_is_its_own() -> None:
    lm, ids = lm_of(PARTS["falcon"](), hook="mlp_out"), ids_of()
    kept: list[Tensor] = []
    given = torch.ones(2, 12, 16)
    clean = lm.logits(ids)
    torch.testing.assert_close(lm.logits(ids, lambda hidden: kept.append(hidden) or hidden), clean)
    assert torch.equal(kept[0], lm.activations(ids))
    lm.logits(ids, lambda _: given)
    assert torch.equal(given, torch.ones(2, 12, 16))


# Which models are read


def test_a_model_whose_tokens_attend_to_later_ones_is_refused() -> None:
    config = transformers.BertConfig(**PLAIN, intermediate_size=24)
    with pytest.raises(ValueError, match=r"model\.name: BertLMHeadModel lets tokens attend to later ones.*is_decoder"):
        lm_of(config)
    config.is_decoder = True
    assert lm_of(config).d_in == 16


def test_a_bidirectional_model_of_hardly_any_attention_is_refused_too() -> None:
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**PLAIN, intermediate_size=24))  # as initialised
    with pytest.raises(ValueError, match="lets tokens attend to later ones"):
        LanguageModel(model, None, layer=0, hook="resid_pre")


@pytest.mark.parametrize(
    "config",
    [
        transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        transformers.BartConfig(vocab_size=300, d_model=16, encoder_layers=2, decoder_layers=3),
    ],
)
def test_encoder_decoders_are_refused_by_their_configuration(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)  # no weights: they are not looked for
    with pytest.raises(ValueError, match=r"model\.name: .* is an encoder-decoder; accepted are causal language models"):
        load_language_model(ModelConfig(name=str(tmp_path)))


def test_models_for_other_things_are_refused_in_one_line(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.name: .* \(vit\) is not a causal language model; accepted") as error:
        load_language_model(ModelConfig(name=str(tmp_path)))
    assert len(str(error.value)) < 300


def test_a_decoder_deeper_than_its_encoder_is_read() -> None:
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = transformers.BartConfig(
        vocab_size=300, d_model=16, encoder_layers=2, decoder_layers=3, max_position_embeddings=64, **sizes
    )
    lm, ids = lm_of(config, layer=2), ids_of()
    states = lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(lm.activations(ids), states[3])


def test_blocks_are_the_text_models_although_a_tower_for_images_has_as_many() -> None:
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.Gemma3TextConfig(**SHARED, **GATED, query_pre_attn_scalar=8, sliding_window=32)
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    lm, ids = LanguageModel(made(config), None, layer=1, hook="resid_post"), ids_of()
    states = lm.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(lm.activations(ids), states[2])


def test_a_model_of_several_streams_is_refused() -> None:
    gated = GATED | {"intermediate_size": [24] * 3}
    config = transformers.Gemma3nTextConfig(
        **SHARED, **gated, query_pre_attn_scalar=8, sliding_window=32, vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 3, layer_types=["full_attention"] * 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.name: Gemma3nForCausalLM has no list of 3 or more blocks"):
        lm_of(config)


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, n_layer: int = 3, n_embd: int = 16, vocab_size: int = 300, **rest: Any) -> None:
        self.n_layer, self.n_embd, self.vocab_size = n_layer, n_embd, vocab_size
        super().__init__(**rest)


class OwnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x).cumsum(1)
        return x + self.mlp(x)


class Own(PreTrainedModel):
    """No `use_cache`, no cache, no transformers name for the embeddings; blocks are called with keywords."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.Sequential(*(OwnBlock(config.n_embd) for _ in range(config.n_layer)))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.emb(input_ids)
        for block in self.h:
            x = block(x=x)
        return CausalLMOutput(logits=self.head(x))


def test_a_model_of_ones_own_is_read_replaced_and_continued() -> None:
    torch.manual_seed(0)
    model, ids = Own(OwnConfig()), ids_of()
    lm = LanguageModel(model, None, layer=1, hook="resid_pre")
    expected = model.h[0](model.emb(ids))
    torch.testing.assert_close(lm.activations(ids), expected)
    torch.testing.assert_close(lm.logits(ids), model.head(model.h[2](model.h[1](expected))))
    torch.testing.assert_close(
        lm.logits(ids, torch.zeros_like), model.head(model.h[2](model.h[1](torch.zeros_like(expected))))
    )
    torch.testing.assert_close(lm.continuations(ids[:, :8], ids[:, 8:]), expected[:, 8:])
    assert (lm.d_in, lm.embeddings, lm.positions) == (16, 300, None)
    with pytest.raises(ValueError, match=r"model\.hook: got 'mlp_out', but no part of OwnBlock"):
        LanguageModel(model, None, layer=1, hook="mlp_out")  # attention is summed outside of its module


class PostNormBlock(OwnBlock):
    """Norms after both parts, with meaningless names; two experts that always run."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.first, self.second, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.ModuleDict()
        self.mlp["routed"], self.mlp["shared"] = nn.Linear(width, width), nn.Linear(width, width)
        self.post_attention_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.attn(x))
        y = self.post_attention_norm(x)
        return x + self.second(self.mlp["routed"](y) + self.mlp["shared"](y))


class ExpertsBlock(PostNormBlock):
    """An MLP alone, in two pieces."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["routed"](x) + self.mlp["shared"](x)


def own_of(block: type[OwnBlock]) -> Own:
    torch.manual_seed(0)
    model = Own(OwnConfig())
    model.h = nn.Sequential(*(block(16) for _ in range(3)))
    for index, parameter in enumerate(model.h.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
    return model


def test_norms_behind_the_parts_are_found_whatever_their_names() -> None:
    model, ids = own_of(PostNormBlock), ids_of()
    for hook, norm in (("attn_out", "first"), ("mlp_out", "second")):
        seen: list[Tensor] = []
        handle = getattr(model.h[1], norm).register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
        model(ids)
        handle.remove()
        assert torch.equal(LanguageModel(model, None, layer=1, hook=hook).activations(ids), seen[0])


def test_half_of_an_mlp_is_no_mlp() -> None:
    with pytest.raises(ValueError, match=r"model\.hook: got 'mlp_out', but (no part of )?ExpertsBlock"):
        LanguageModel(own_of(ExpertsBlock), None, layer=1, hook="mlp_out")


def test_a_model_that_needs_more_than_token_ids_is_refused() -> None:
    class Needy(Own):
        def forward(self, input_ids: Tensor, pixels: Tensor) -> CausalLMOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(input_ids + pixels)

    with pytest.raises(ValueError, match=r"model\.name: Needy does not run on token ids alone \(TypeError: .*pixels"):
        LanguageModel(Needy(OwnConfig()), None, layer=1, hook="resid_pre")
