"""What an import pulls in, seen in fresh processes; and that this test can fail."""

import subprocess
import sys
from importlib.resources import files

import pytest

HEAVY = ("transformers", "datasets", "sklearn", "scipy", "pandas", "rich", "tyro", "pydantic")


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter."""
    report = f"{code}\nimport sys; print('\\n' + ' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HELP = "import sys; sys.argv = ['c2r', '--help']\nfrom c2r.cli import main\ntry: main()\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    ("code", "torch"),
    [("import c2r", False), ("import c2r; c2r.consistency_penalty; c2r.nearest_neighbors; c2r.SAE", True)],
)
def test_the_library_loads_torch_and_nothing_heavier(code: str, torch: bool) -> None:
    loaded = loaded_by(code)
    assert not loaded.intersection(HEAVY)
    assert ("torch" in loaded) == torch


def test_help_does_not_load_torch() -> None:
    assert not loaded_by(HELP).intersection({"torch", "transformers", "datasets"})


def test_the_package_says_that_it_is_typed() -> None:
    assert (files("c2r") / "py.typed").is_file()


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "c2r", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("c2r ")


def test_these_tests_can_fail() -> None:
    assert {"torch", "transformers"} <= loaded_by("import torch, transformers\n" + HELP)


def test_every_public_name_is_there() -> None:
    import c2r

    for name in c2r.__all__:
        assert getattr(c2r, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        c2r.nonsense  # noqa: B018
