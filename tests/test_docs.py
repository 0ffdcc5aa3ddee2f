"""What docs/generate.py makes of the code: every key of the configuration and every option is there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from builders import ROOT
from c2r.cli import COMMANDS
from c2r.config.base import Frozen
from c2r.config.evaluations import EvaluationConfig
from c2r.config.known_features import PRESETS
from c2r.config.load import parse_config
from c2r.config.run import RunConfig
from c2r.config.saes import SECTIONS
from c2r.config.yaml_text import load_yaml


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def sections_in(generate: ModuleType, config: type[Frozen]) -> set[type[Frozen]]:
    inner = {found for field in config.model_fields.values() for found in generate.classes_of(field.annotation)}
    return {config}.union(*(sections_in(generate, section) for section in inner))


def test_every_key_is_listed(generate: ModuleType) -> None:
    page = generate.configuration()
    roots = [RunConfig, EvaluationConfig, *SECTIONS.values(), *PRESETS.values()]
    for section in set().union(*(sections_in(generate, root) for root in roots)):
        for name, field in section.model_fields.items():
            assert f"| [`{field.alias or name}`](#" in page, f"{section.__name__}.{name}"
    for name in [*SECTIONS, *PRESETS]:
        assert re.search(rf"^### `(method|preset): {name}`", page, re.MULTILINE)


def test_links_to_keys_are_unique(generate: ModuleType) -> None:
    ids = re.findall(r"\{ #(\S+) \}", generate.configuration())
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("section", "key", "cells"),
    [
        ("train", "lr", ["number > 0", "`0.0002`"]),
        ("train", "tokens", ["whole number ≥ 1", "required"]),
        ("stream", "max_norm_multiple", ["number > 1 or null", "`10.0`"]),
        ("saes.c2r", "lambda", ["number ≥ 0 or null", "`null`"]),
        ("saes.c2r", "margin", ["number ≥ 0, < 1 or `floor`", "`0.0`"]),
        ("saes.gated", "clip", ["number > 0 or null", "`null`"]),
        ("data", "drop_tokens", ["list of whole number or text", "`[]`"]),
    ],
)
def test_types_and_defaults(generate: ModuleType, section: str, key: str, cells: list[str]) -> None:
    link = f"{section}.{key}"
    row = next(row for row in generate.configuration().splitlines() if row.startswith(f"| [`{key}`](#{link})"))
    assert row.split(" | ")[1:3] == cells


def test_a_docstring_stands_beside_its_key(generate: ModuleType) -> None:
    class Example(Frozen):
        """An example."""

        first: int = 1
        """Of the first,
        on two lines."""
        second: int = 2

    Example.__module__ = "c2r.example"
    source = "class Example:\n    first: int = 1\n    '''Of the first,\n    on two lines.'''\n    second: int = 2\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.inspect, "getsource", lambda cls: source if cls is Example else "class Frozen: pass")
        first, second = generate.table(Example, "example").splitlines()[2:]
    assert first.endswith("| Of the first, on two lines. |")
    assert second.endswith("|  |")


def test_bars_are_escaped_but_not_in_code(generate: ModuleType) -> None:
    assert generate.row(["`<|x|>`", "a|b"]) == "| `<|x|>` | a\\|b |"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_listed(generate: ModuleType, command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "c2r", command, "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"^│ (--[a-z-]+)", done.stdout, re.MULTILINE)) - {"--no"}
    assert len(options) > 0
    section = "\n".join(generate.command(command, COMMANDS[command]))
    assert options == set(re.findall(r"`(--[a-z-]+)`\]", section))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_whole_configurations_in_the_pages_are_accepted(page: Path) -> None:
    for block in re.findall(r"```yaml[^\n]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if re.search(r"^output:", block, re.MULTILINE) and re.search(r"^saes:", block, re.MULTILINE):
            raw = load_yaml(block)
            assert isinstance(raw, dict)
            parse_config(raw, page.name)


def test_the_example_of_the_first_page(tmp_path: Path) -> None:
    first, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "getting-started.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", first], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_page_of_the_navigation_exists() -> None:
    pages = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    made = {"guides/quickstart.md"}
    assert len(pages) > 20
    assert {page for page in pages if not (ROOT / "docs" / page).is_file()} == made
