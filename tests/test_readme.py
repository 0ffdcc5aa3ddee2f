"""The README: its own-loop example runs and does what it says; its figures' picture is there."""

import re

import pytest
import torch
from torch import Tensor

import c2r
from builders import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_runs_and_lowers_the_cosines_that_it_penalises() -> None:
    section = TEXT.split("## C²R in your own training loop")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    small = code.replace("B, D, F = 2048, 256, 4096", "B, D, F = 256, 16, 64")
    assert small != code
    found = {}
    for strength in ("0.0", "0.9"):
        torch.manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
        batches = [(torch.rand(256, 40) < 0.05).float() @ directions for _ in range(150)]
        names: dict[str, object] = {"batches": [x / x.square().sum(1).mean().sqrt() for x in batches]}
        exec(small.replace("lambda_of_strength(0.9", f"lambda_of_strength({strength}"), names)
        decoder = names["W_dec"]
        assert isinstance(decoder, Tensor)
        found[strength] = c2r.nearest_neighbors(decoder.detach()).cosine.mean().item()
    assert found["0.9"] < found["0.0"] - 0.05


def test_the_loop_fits_its_promise() -> None:
    section = TEXT.split("## C²R in your own training loop")[1]
    assert len(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0].splitlines()) <= 20


@pytest.mark.parametrize("command", re.findall(r"^    make (\w[\w-]*)", TEXT, re.MULTILINE))
def test_the_commands_exist(command: str) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
