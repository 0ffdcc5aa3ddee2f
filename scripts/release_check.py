"""Builds the sdist and the wheel, and tries the wheel as a user would: in a fresh environment, outside the checkout.

    python scripts/release_check.py [--seconds 60] [--keep]

Checks that the sdist has every file of the repository that its tests and documentation need, that the wheel is typed
and carries its assets, that `import c2r` and `c2r --help` work, and that `c2r demo`, stopped by SIGTERM after
`--seconds`, leaves a checkpoint and SAE folders. Packages come from PyPI; constraints.txt pins them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_IN_SDIST = (".ci/", ".github/", ".pre-commit-config.yaml")
"""Beginnings of the tracked files that only the repository needs."""
IN_WHEEL = (
    "c2r/py.typed", "c2r/assets/demo.yaml", "c2r/assets/known_features.yaml", "c2r/assets/held_out.txt",
    "c2r/assets/embedded/model.safetensors", "c2r/assets/embedded/tokenizer.json",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the demo runs before it is stopped")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the packages and the environment")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="c2r-release-"))
    try:
        wheel = build(folder)
        python = environment(folder / "installed", str(wheel))
        check_installed(python, folder)
        check_demo(python, folder, args.seconds)
    finally:
        if args.keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    say("release check passed")


def build(folder: Path) -> Path:
    """Build an sdist, and from the sdist a wheel; check what is in them."""
    say("building sdist and wheel")
    python = environment(folder / "builder", "build")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    missing = {name for name in listed.splitlines() if not name.startswith(NOT_IN_SDIST)} - packed
    if missing:
        fail(f"{sdist.name} lacks {', '.join(sorted(missing))}; see tool.hatch.build.targets.sdist in pyproject.toml")
    with zipfile.ZipFile(wheel) as archive:
        missing = set(IN_WHEEL) - set(archive.namelist())
    if missing:
        fail(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    say(f"{sdist.name} {sdist.stat().st_size / 1e6:.1f} MB, {wheel.name} {wheel.stat().st_size / 1e6:.1f} MB")
    return wheel


def environment(folder: Path, *packages: str) -> Path:
    """A fresh environment with some packages; returns its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    say(f"installing {', '.join(Path(package).name for package in packages)}")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(python, *pip, *packages)
    return python


def check_installed(python: Path, folder: Path) -> None:
    """Import the library and print the help, outside the checkout."""
    code = "import c2r; from pathlib import Path; print(Path(c2r.__file__).parent, c2r.SAE, c2r.consistency_penalty)"
    where = run(python, "-c", code, cwd=folder)
    if not where.startswith(str(folder)):
        fail(f"import c2r found another copy: {where}")
    shown = run(python.parent / "c2r", "--help", cwd=folder)
    for command in ("demo", "harvest", "train", "eval", "audit"):
        if command not in shown:
            fail(f"c2r --help does not name {command!r}")
    say("import c2r and c2r --help work")


def check_demo(python: Path, folder: Path, seconds: float) -> None:
    """Start the demo, stop it by SIGTERM, and look for what it must have saved."""
    say(f"running c2r demo for {seconds:.0f} seconds")
    out = folder / "demo"
    environ = clean_environment() | {"HF_HUB_OFFLINE": "1", "C2R_CACHE": str(folder / "cache")}
    demo = subprocess.Popen([python.parent / "c2r", "demo", "--out", out], cwd=folder, env=environ)
    try:
        demo.wait(timeout=seconds)
        stopped = False
    except subprocess.TimeoutExpired:
        demo.send_signal(signal.SIGTERM)
        stopped = True
    try:
        status = demo.wait(timeout=300)
    finally:
        demo.kill()
    if status != (143 if stopped else 0):
        fail(f"c2r demo ended with status {status}")
    found = sorted(path.parent.relative_to(out) for path in out.glob("*/sae_weights.safetensors"))
    checkpoints = sorted(path.relative_to(out) for path in out.glob("checkpoints/step_*"))
    if len(found) < 2 or not checkpoints:
        fail(f"c2r demo left SAEs {list(map(str, found))} and checkpoints {list(map(str, checkpoints))}")
    say(f"the demo {'was stopped' if stopped else 'ended'} and left {', '.join(map(str, [*found, *checkpoints]))}")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; if it fails, its errors are shown and the check ends."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        fail(f"{' '.join(map(str, command))} ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Without what would let Python find the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def fail(text: str) -> None:
    raise SystemExit(f"release check failed: {text}")


if __name__ == "__main__":
    main()
