"""The floors of the house: a module imports only from lower ones, type-only imports included; and no circle."""

import ast
from pathlib import Path

import pytest

from builders import ROOT

SOURCE = ROOT / "src" / "c2r"
FLOORS: list[set[str]] = [
    {"version", "layout", "storage", "memory", "machine", "progress", "intervals", "assets"},
    {"config", "kernels"},
    {"identity"},
    {"sae", "neighbors", "text"},
    {"language_model"},
    {"penalty", "activations", "interop"},
    {"losses", "known_features"},
    {"schedules", "step"},
    {"methods"},
    {"training", "eval"},
    {"report"},
    {"demo", "study"},
    {"cli"},
    {"__main__"},
]
"""From the ground up. Rooms of one floor do not import each other; `__init__` names lazily what users import."""
ALONE: dict[str, set[str]] = {
    "kernels": {"machine"},
    "config": {"layout"},
    "penalty": {"kernels", "neighbors"},
    "neighbors": {"kernels"},
    "sae": {"kernels"},
    "report": {"intervals", "layout", "storage"},
    "interop": {"sae", "storage", "layout"},
}
"""Rooms that may import even less: all that they may."""


def imports_of(folder: Path) -> dict[str, set[str]]:
    """Each module's imports within the package, as dotted names below it."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        modules = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "c2r":
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names if alias.name.startswith("c2r.")}
        found[name] = {module.removeprefix("c2r.") for module in modules}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def faults(folder: Path) -> list[str]:
    """Every import that goes up, sideways, or further than `ALONE` allows."""
    level = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    found = []
    for module, imported in imports_of(folder).items():
        if module == "__init__":
            continue
        if room(module) not in level:
            found.append(f"{module} is on no floor")
            continue
        for other in sorted({room(name) for name in imported} - {room(module)}):
            if other not in level or level[other] >= level[room(module)]:
                found.append(f"{module} imports {other}, which is not below it")
            elif other not in ALONE.get(room(module), {other}):
                found.append(f"{module} imports {other}, which {room(module)} may not")
    return found


def circles(folder: Path) -> list[str]:
    """Modules that import each other, directly or around a corner."""
    graph = imports_of(folder)
    edges = {
        module: {target for name in imported for target in (name, name.rpartition(".")[0]) if target in graph}
        for module, imported in graph.items()
        if module != "__init__"
    }
    done: set[str] = set()
    found = []

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            found.append(" → ".join((*way[way.index(module) :], module)))
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())
    return found


def test_imports_go_down() -> None:
    assert faults(SOURCE) == []


def test_there_is_no_circle() -> None:
    assert circles(SOURCE) == []


@pytest.mark.parametrize(
    ("module", "line", "says"),
    [
        ("kernels/rows.py", "from c2r.sae.model import SAE", "kernels.rows imports sae, which is not below it"),
        ("methods.py", "from c2r.training.run import Run", "methods imports training, which is not below it"),
        ("training/run.py", "import c2r.eval.suite", "training.run imports eval, which is not below it"),
        ("penalty.py", "from c2r.config.run import RunConfig", "penalty imports config, which penalty may not"),
        ("new.py", "", "new is on no floor"),
    ],
)
@pytest.mark.parametrize("typing_only", [False, True])
def test_these_tests_can_fail(module: str, line: str, says: str, typing_only: bool, tmp_path: Path) -> None:
    copy_of_imports(tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\nif TYPE_CHECKING:\n    {line or 'pass'}\n" if typing_only else f"\n{line}\n")
    assert says in faults(tmp_path)


def test_a_circle_is_found(tmp_path: Path) -> None:
    copy_of_imports(tmp_path)
    with (tmp_path / "sae" / "model.py").open("a") as file:
        file.write("\nfrom c2r.sae.encoder import Encoder\n")
    assert any("sae.encoder" in circle and "sae.model" in circle for circle in circles(tmp_path))


def copy_of_imports(folder: Path) -> None:
    for path in SOURCE.rglob("*.py"):
        target = folder / path.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"))
