"""Whether the true sae-bench 0.6.0 takes what c2r hands it: each `c2r eval --suite saebench:…`, offline.

    python3 -m venv sbenv && sbenv/bin/pip install torch==2.13.0
    sbenv/bin/pip install --no-deps sae-bench==0.6.0 sae-lens==6.54.12
    sbenv/bin/pip install numpy==1.26.4 datasets==3.6.0 pyarrow==25.0.1 transformers==5.23.0 transformer-lens==3.9.0
    sbenv/bin/pip install pandas==2.3.3 scikit-learn nltk python-dotenv simple-parsing tenacity plotly plotly-express
    sbenv/bin/pip install babe tabulate collectibles seaborn matplotlib tyro
    HF_HUB_OFFLINE=1 PYTHONPATH=src sbenv/bin/python benchmarks/sae_bench_handover.py

sae-bench's own code runs: its `run_eval`, probes, ablations, interventions and result files. Stand-ins are the language
model (a small random GPT-NeoX, whose embeddings carry the first letter, under the name of Pythia 160M) and the texts,
which it would download. So the figures mean nothing; asked is that they come out, that sae-bench reads the same
activations as c2r, and that it finds the same figures in what c2r hands over as in the folder that SAELens loads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from c2r.config.run import ModelConfig
from c2r.eval.saebench import evaluation as bridge
from c2r.eval.saebench.handover import HandedSAE
from c2r.eval.suite import evaluate
from c2r.interop.saelens import load_sae, save_sae
from c2r.language_model import model as harvest
from c2r.sae.model import SAE

NAME, LAYER, D = "EleutherAI/pythia-160m-deduped", 1, 64
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = [a.lower() + b + c for a in LETTERS for b in "aeiouy" for c in ("b", "lk", "n", "rt", "s")]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE in which each of `WORDS` is one token after a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = [f" {word} has the first letter: {word[0].upper()}" for word in WORDS] * 3
    tokenizer.train_from_iterator([*lines, " The land of is in a place which speak and"] * 2, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def make_model(folder: Path) -> torch.Tensor:
    """Save the stand-in for Pythia; returns the letters' directions `[26, D]`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=D, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
    letters = torch.nn.functional.normalize(torch.randn(26, D), dim=1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_(std=0.2)  # pyright: ignore[reportCallIssue]
        for token, index in tokenizer.get_vocab().items():
            word = tokenizer.convert_tokens_to_string([token]).strip()
            if word.isascii() and word.isalpha():
                embedding[index] += 3.0 * letters[LETTERS.index(word[0].upper())]  # pyright: ignore[reportIndexIssue]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return letters


def hooked(folder: Path) -> Any:
    """The same model as TransformerLens has it."""
    import transformer_lens
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    inner = transformers.GPTNeoXForCausalLM.from_pretrained(folder)
    given = inner.config
    config = transformer_lens.HookedTransformerConfig(
        n_layers=given.num_hidden_layers, d_model=D, n_ctx=256, d_head=D // 4, n_heads=4, d_mlp=128, act_fn="gelu",
        d_vocab=given.vocab_size, eps=given.layer_norm_eps, positional_embedding_type="rotary", rotary_dim=D // 16,
        rotary_adjacent_pairs=False, rotary_base=10000, parallel_attn_mlp=True, normalization_type="LN",
        original_architecture="GPTNeoXForCausalLM",
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformer_lens.HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
    model.load_and_process_state_dict(
        convert_neox_weights(inner, config), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return model


def make_sae(folder: Path, letters: torch.Tensor) -> None:
    """An SAE folder: latents for the letters, and random ones."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.cat([letters, torch.randn(614, D, generator=generator)]), dim=1)
    sae = SAE(rows, torch.full((len(rows),), -0.5), rows.clone(), torch.zeros(D), architecture="standard")
    model = {"name": NAME, "layer": LAYER, "hook": "resid_post", "dtype": "float32"}
    metadata = {"model_name": NAME, "hook_name": f"blocks.{LAYER}.hook_resid_post"}
    save_sae(sae, folder, metadata=metadata, c2r={"model": model, "data": {"source": "stdlib"}})


def texts(classes: list[str], count: int, seed: int) -> dict[str, list[str]]:
    """A class is a letter: its texts are words that begin with it."""
    rng = random.Random(seed)
    found = {}
    for number, name in enumerate(classes):
        own = [word for word in WORDS if word[0].upper() == LETTERS[number % 26]]
        found[name] = [" " + " ".join(rng.choices(own, k=12)) for _ in range(count)]
    return found


def make_ravel(home: Path, folder: Path) -> None:
    """RAVEL's files for one kind of entity, labelled with what the model answers, so that it knows every answer."""
    from sae_bench.evals.ravel.generation import generate_batched

    base = home / "sae_bench" / "artifacts" / "ravel" / "base"
    base.mkdir(parents=True)
    entities = [word.title() for word in WORDS[::13]]
    templates = {"Country": [" The land of %s is in a place"], "Continent": [" The land which %s is and"]}
    model = transformers.GPTNeoXForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    labels: dict[str, dict[str, str]] = {entity: {} for entity in entities}
    for attribute, (template,) in templates.items():
        prompts = [tokenizer.encode(template % entity) for entity in entities]
        for entity, answer in zip(entities, generate_batched(model, tokenizer, prompts, max_new_tokens=1), strict=True):
            labels[entity][attribute] = answer.strip() or "nothing"
    for name, content in {
        "attribute_to_prompts": templates,
        "prompt_to_split": {template: "train" for (template,) in templates.values()},
        "entity_attributes": labels,
        "entity_to_split": dict.fromkeys(entities, "train"),
    }.items():
        (base / f"ravel_city_{name}.json").write_text(json.dumps(content))


def stand_in(folder: Path) -> None:
    """Put the model and the texts in the place of what would be downloaded, and shrink what would take long."""
    import sae_bench.evals.ravel.main as ravel
    import sae_bench.evals.scr_and_tpp.main as scr_and_tpp
    import sae_bench.evals.sparse_probing.main as sparse_probing
    import transformer_lens
    from sae_bench.sae_bench_utils import dataset_info

    model_path = harvest.model_path
    harvest.model_path = lambda name: str(folder) if name == NAME else model_path(name)
    transformer_lens.HookedTransformer.from_pretrained_no_processing = lambda *_, **__: hooked(folder)
    ravel.LLM_NAME_MAP["pythia-160m-deduped"] = str(folder)

    def multi_label(name: str, train: int, test: int, seed: int) -> Any:
        classes = dataset_info.chosen_classes_per_dataset[name]
        return texts(classes, train, seed), texts(classes, test, seed + 1)

    def any_kind(name: str, spurious: bool, train: int, test: int, seed: int, *_: Any, **__: Any) -> Any:
        classes = list(dataset_info.PAIRED_CLASS_KEYS) + list(dataset_info.PAIRED_CLASS_KEYS.values())
        if not spurious:
            return multi_label(name, train, test, seed)
        return texts(classes, train // 2, seed), texts(classes, test // 2, seed + 1)

    sparse_probing.dataset_utils.get_multi_label_train_test_data = multi_label
    scr_and_tpp.dataset_creation.get_train_test_data = any_kind
    bios = "LabHC/bias_in_bios_class_set1"
    small = {
        "dataset_names": [bios],
        "train_set_size": 64,
        "test_set_size": 32,
        "probe_epochs": 3,
        "context_length": 16,
    }
    shrunk = {
        "tpp": small,
        "scr": {**small, "column1_vals_lookup": {bios: [("professor", "nurse")]}},
        "sparse_probing": {
            "dataset_names": [bios], "probe_train_set_size": 64, "probe_test_set_size": 32, "context_length": 16,
        },
        "ravel": {
            "entity_attribute_selection": {"city": ["Country", "Continent"]}, "num_pairs_per_attribute": 40,
            "llm_batch_size": 8,
        },
        "absorption": {"k_sparse_probe_num_epochs": 20},
        "meta_structure": {"train_steps": 200},
    }  # fmt: skip
    for name, settings in shrunk.items():
        foreign = bridge.FOREIGN[name]
        bridge.FOREIGN[name] = dataclasses.replace(foreign, settings={**foreign.settings, **settings})


def check_attributes(sae: SAE) -> None:
    """All that sae-bench's base class of custom SAEs promises is there, and of its shape."""
    from sae_bench.custom_saes.base_sae import BaseSAE
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    class Reference(BaseSAE):
        encode = decode = forward = None

    model = ModelConfig(name=NAME, layer=LAYER)
    reference = Reference(sae.d_in, sae.width, NAME, LAYER, torch.device("cpu"), torch.float32)
    handed = HandedSAE(sae, model, NAME)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert getattr(handed, name).shape == getattr(reference, name).shape, name
    load_and_format_sae("name", handed, "cpu")
    load_and_format_sae("name", reference, "cpu")
    for name in ("model_name", "d_in", "d_sae", "hook_layer", "hook_name", "dtype", "hook_head_index"):
        assert getattr(handed.cfg, name) == getattr(reference.cfg, name), name
    half = handed.to(device="cpu", dtype=torch.bfloat16)
    assert half is handed
    assert half.dtype == half.encode(torch.randn(2, sae.d_in)).dtype == torch.bfloat16
    assert sae.W_dec.dtype == torch.float32
    assert BaseSAE.check_decoder_norms(handed)


def main() -> None:
    from sae_lens import SAE as SAELens  # noqa: N811

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ["C2R_CACHE"] = str(home / "cache")
        folder, sae_folder = home / "model", home / "sae"
        letters = make_model(folder)
        make_sae(sae_folder, letters)
        stand_in(folder)
        make_ravel(home / "cache", folder)
        sae = load_sae(sae_folder)
        check_attributes(sae)
        lm = harvest.load_language_model(ModelConfig(name=NAME, layer=LAYER))
        ids = torch.randint(1, 500, (4, 20))
        _, cache = hooked(folder).run_with_cache(
            ids, names_filter=HandedSAE(sae, ModelConfig(layer=LAYER), "").cfg.hook_name
        )
        (theirs,) = cache.values()
        difference = (lm.activations(ids) - theirs).abs().max().item()
        print(f"the same hook point: activations differ by {difference:.1e} at most")
        assert difference < 1e-4
        found: dict[str, Any] = {name: {} for name in bridge.FOREIGN}
        for which, hand_over in {"c2r": HandedSAE, "sae_lens": lambda *_: SAELens.load_from_disk(sae_folder)}.items():
            bridge.HandedSAE = hand_over
            for name, row in found.items():
                start = time.perf_counter()
                try:
                    summary = evaluate([sae_folder], home / which, suites=(f"saebench:{name}",), seed=42)["sae"]
                    row[which] = {**summary, "seconds": round(time.perf_counter() - start, 1)}
                except ValueError as error:
                    row[which] = {"error": str(error)}
        for path in sorted((home / "c2r").iterdir()):
            result = json.loads(path.read_text())
            warning = result["eval_result_unstructured"]["warning"]
            print(path.name, result["eval_type_id"], *(["WARNING:", warning] if warning else []))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
