"""Habits that nobody has to remember: legends of shapes, names in the docs, words of messages, types, second calls."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import c2r
from builders import ROOT, known_run

SOURCE = ROOT / "src" / "c2r"
FILES = sorted(SOURCE.rglob("*.py"))
SHAPED = re.compile(r"\b[A-Za-z][A-Za-z0-9]*(?:_[a-z0-9]+)*_([A-Za-z0-9]{1,4})\b")
LETTERS = re.compile(r"^[A-Zkmnp]{1,3}$|^\d?[A-Z]{1,3}$")
LEGEND = re.compile(r"^(?:[A-Za-z0-9']+(?:, [A-Za-z0-9']+)* [^·]+·? ?)+\.?$")


def shapes_of(tree: ast.Module) -> set[str]:
    """The letters of shapes that are suffixes of names in a module: `x_BD` has B and D."""
    found: set[str] = set()
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
        stem, _, suffix = name.rpartition("_")
        if stem and not stem.isupper() and re.fullmatch(r"[A-Zmnkpdcl]*[A-Z][A-Z]*|[nkpmcdl][A-Z]?", suffix):
            found |= set(suffix)
    return {letter for letter in found if letter.isupper()}


def test_every_file_says_what_the_letters_of_its_shapes_are() -> None:
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = ast.get_docstring(tree) or ""
        legend = set(re.findall(r"(?<![\w`])([A-Z])(?:(?:, [A-Z])* |(?= and [A-Z] ))(?=[a-z0-9])", said))
        legend |= {letter for group in re.findall(r"(?<![\w`])((?:[A-Z], )+[A-Z]) ", said) for letter in group[::3]}
        if lacking := sorted(shapes_of(tree) - legend):
            missing.append(f"{path.relative_to(SOURCE)}: {' '.join(lacking)}")
    assert missing == []


def messages_of(tree: ast.Module) -> Iterator[str]:
    """The beginnings of all messages that a module raises."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            first = node.exc.args[0]
            part = first.values[0] if isinstance(first, ast.JoinedStr) and first.values else first
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def test_no_message_of_the_library_begins_with_a_command_line_option() -> None:
    found = [
        f"{path.relative_to(SOURCE)}: {message}"
        for path in FILES
        if path.name != "cli.py"
        for message in messages_of(ast.parse(path.read_text(encoding="utf-8")))
        if message.lstrip().startswith("-")
    ]
    assert found == []


def test_the_guards_above_can_fail() -> None:
    tree = ast.parse('"""D width."""\nx_BD = 1\nraise ValueError(f"--tokens: got {x_BD}")')
    assert shapes_of(tree) == {"B", "D"}
    assert list(messages_of(tree)) == ["--tokens: got "]


# Names in the docs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATHS = re.compile(r"`((?:src|tests|docs|benchmarks|scripts|recipes|examples)/[\w./*-]+)`")
SYMBOLS = re.compile(r"`(c2r(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")


def names_that_do_not_exist(text: str) -> list[str]:
    """Paths of the checkout and dotted names of the package that a page mentions and that are not there."""
    missing = [path for path in PATHS.findall(text) if not any(ROOT.glob(path.rstrip("/.")))]
    return missing + [name for name in SYMBOLS.findall(text) if not exists(name)]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, an attribute of one, or a field of the c2r section of `cfg.json`."""
    if (
        name.split(".")[1] in ("data", "model", "state", "sae", "train", "identity", "machines", "seed")
        and not (SOURCE / name.split(".")[1]).is_dir()
    ):
        return True  # c2r.state.max_norm and the like are keys of cfg.json
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part) and part not in getattr(found, "model_fields", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_docs_name_exists(page: Path) -> None:
    if page.name == "log.md":
        pytest.skip("a log names what was")
    assert names_that_do_not_exist(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_docs_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    generated = {"reference/configuration.md", "reference/command-line.md", "guides/quickstart.md"}
    missing = [
        target
        for target in local
        if not (page.parent / target).exists()
        and not any((page.parent / target).resolve() == ROOT / "docs" / name for name in generated)
    ]
    assert missing == []


def test_snippets_in_pages_are_as_the_site_reads_them() -> None:
    """A formatter of code in pages once rewrote `--8<-- "file"`, which the site then showed as text."""
    assert [page for page in PAGES if re.search(r'--8 ?<(?!-- ["\[])', page.read_text(encoding="utf-8"))] == []


def test_these_two_can_fail() -> None:
    text = "`src/c2r/nowhere.py`, `c2r.penalty.nothing`, `c2r.penalty.consistency_penalty`, `docs/index.md`"
    assert names_that_do_not_exist(text) == ["src/c2r/nowhere.py", "c2r.penalty.nothing"]


# The package


def test_types_ship() -> None:
    assert (SOURCE / "py.typed").is_file()


CALLS = {
    "consistency_penalty": lambda tmp: c2r.consistency_penalty(torch.rand(8, 5), torch.randn(5, 3)),
    "lambda_of_strength": lambda tmp: c2r.lambda_of_strength(0.9, batch=8, width=5),
    "strength_of_lambda": lambda tmp: c2r.strength_of_lambda(0.9, batch=8, width=5),
    "nearest_neighbors": lambda tmp: c2r.nearest_neighbors(torch.randn(5, 3)),
    "load_config": lambda tmp: c2r.load_config(SOURCE / "assets" / "demo.yaml"),
    "train": lambda tmp: c2r.train(known_run(tmp / "run"), overwrite=True),
    "load": lambda tmp: c2r.load(tmp / "run" / "baseline"),
    "evaluate": lambda tmp: c2r.evaluate([tmp / "run" / "baseline"], suites=("recovery",), tokens=300),
}


def test_every_public_callable_can_be_called_twice(tmp_path: Path) -> None:
    public = {name for name in c2r.__all__ if inspect.isroutine(getattr(c2r, name))}
    assert public == set(CALLS)
    for name, call in CALLS.items():
        before = getattr(c2r, name)
        for _ in range(2):
            call(tmp_path)
        assert getattr(c2r, name) is before, f"c2r.{name} is another object after its first call"
    assert len(c2r.NeighborTable("exact").refresh(torch.randn(5, 3)).index) == 5
