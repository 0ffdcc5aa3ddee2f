"""Atomic writing of files, marks and locks of folders, and what is deleted from them."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from c2r import storage
from c2r.storage import (
    MARK,
    Busy,
    check_writable,
    held,
    in_the_way,
    marked,
    read_held,
    record,
    recorded,
    remove_recorded,
    strangers,
    whole,
    write_text,
)


def taken(folder: Path) -> Path:
    with held(folder, "run", "output", "training in"):
        pass
    return folder


# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text(path, "before", "out")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(ValueError, match=r"^out: cannot write .*a\.json \(5 bytes; [\d,]+ free .*No space left"):
        write_text(path, "after", "out")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.json"]
    monkeypatch.undo()
    write_text(path, "nach ρ", "out")
    assert path.read_text(encoding="utf-8") == "nach ρ"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*folder"):
        write_text(tmp_path / "folder", "x", "out")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def filled(folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_takes_the_place_of_an_older_one_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    filled(tmp_path / "sae", weights="old", notes="the user's")
    with whole(tmp_path / "sae", others=lambda name: name != "weights") as partial:
        filled(partial, weights="new", config="new")
        assert contents(tmp_path / "sae") == {"weights": "old", "notes": "the user's"}
    assert contents(tmp_path / "sae") == {"weights": "new", "config": "new", "notes": "the user's"}
    with whole(tmp_path / "sae") as partial:
        filled(partial, weights="newer")
    assert contents(tmp_path / "sae") == {"weights": "newer"}
    assert os.listdir(tmp_path) == ["sae"]


@pytest.mark.parametrize("where", ["block", "flush", "rename"])
def test_a_folder_that_cannot_be_written_leaves_the_older_one(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "sae", weights="old")
    rename = Path.rename

    def refused(*_: object) -> NoReturn:
        raise OSError("no")

    def half(self: Path, target: Path) -> Path:
        return refused() if self.name.endswith(".partial") else rename(self, target)

    if where == "flush":
        monkeypatch.setattr(storage.os, "fsync", refused)
    elif where == "rename":
        monkeypatch.setattr(Path, "rename", half)
    with pytest.raises(OSError, match="no"), whole(tmp_path / "sae") as partial:  # noqa: PT012
        filled(partial, weights="new")
        if where == "block":
            refused()
    monkeypatch.undo()
    assert contents(tmp_path / "sae") == {"weights": "old"}
    assert os.listdir(tmp_path) == ["sae"]


def test_what_cannot_be_written_is_found_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "deep", "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"out: cannot write in .*: .*file is not a folder"):
            check_writable(folder, "out")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dangling is not a folder"):
        check_writable(tmp_path / "dangling", "out")

    def refused(self: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(ValueError, match=r"out: cannot write in .*deep: Permission denied"):
        check_writable(tmp_path / "new" / "deep", "out")


# Ownership


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        ValueError, match=r"output: .* contains files that c2r did not write \(checkpoints\); choose a new or empty"
    ):
        taken(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoints"]
    taken(tmp_path / "cache")
    assert strangers(tmp_path / "cache", "run") == []
    assert strangers(tmp_path / "cache", "cache") == [MARK]  # a run's folder cannot become a cache


def test_a_mark_that_was_not_finished_is_finished(tmp_path: Path) -> None:
    first = (taken(tmp_path / "a") / MARK).read_bytes()
    for length in (0, 1, len(first) - 1):
        folder = tmp_path / f"b{length}"
        folder.mkdir()
        (folder / MARK).write_bytes(first[:length])
        assert not marked(folder, "run")
        assert (taken(folder) / MARK).read_bytes() == first
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / MARK).write_text("another program's")
    with pytest.raises(ValueError, match=r"did not write \(\.c2r\)"):
        taken(tmp_path / "c")


def test_the_record_grows_and_a_line_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    taken(tmp_path)
    record(tmp_path, "run", ["a", "b/*.json"], "output")
    record(tmp_path, "run", ["b/*.json", "c"], "output")
    assert recorded(tmp_path, "run") == ["a", "b/*.json", "c"]
    with (tmp_path / MARK).open("a") as file:
        file.write("d/")
    assert recorded(tmp_path, "run") == ["a", "b/*.json", "c"]
    record(tmp_path, "run", ["e"], "output")
    assert recorded(tmp_path, "run")[-1] == "e"


def test_only_what_is_recorded_is_removed(tmp_path: Path) -> None:
    folder, elsewhere = taken(tmp_path / "run"), tmp_path / "elsewhere"
    record(folder, "run", ["run.yaml", "checkpoints/step_*/state.json", "logs/x-7/**", "linked/a", "one"], "output")
    ours = ["run.yaml", "checkpoints/step_1/state.json", "logs/x-7/deep/file", "one", ".run.yaml.0123abcd.partial"]
    theirs = [
        "notes.txt", "checkpoints/epoch_1/model.pt", "checkpoints/step_2/mine.txt", "logs/x-8/file", "ones",
        "deep/run.yaml",
    ]  # fmt: skip
    for name in [*ours, *theirs]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    elsewhere.mkdir()
    (elsewhere / "a").write_text("x")
    (folder / "linked").symlink_to(elsewhere)
    left = remove_recorded(folder, "run")
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    assert found == sorted(theirs)
    assert left == ["checkpoints", "deep", "logs", "notes.txt", "ones"]
    assert not (folder / "checkpoints" / "step_1").exists()
    assert not (folder / "linked").is_symlink()
    assert (elsewhere / "a").read_text() == "x"
    assert marked(folder, "run")
    assert recorded(folder, "run") == []


def test_names_that_are_needed_and_taken_are_found(tmp_path: Path) -> None:
    taken(tmp_path)
    record(tmp_path, "run", ["a/x"], "output")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    assert in_the_way(tmp_path, "run", ["a/x", "b/y", "d"]) == ["b"]


# Locks


def test_a_second_writer_is_refused_also_from_another_thread(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def other() -> None:
        try:
            taken(tmp_path / "run")
        except ValueError as error:
            errors.append(error)

    with held(tmp_path / "run", "run", "output", "training in"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert isinstance(errors[0], Busy)
    assert str(errors[0]).startswith(f"output: another process is training in {tmp_path / 'run'}")
    other()
    assert len(errors) == 1


def test_readers_share_and_keep_writers_out(tmp_path: Path) -> None:
    folder = taken(tmp_path / "run")
    with read_held(folder, "cache.path"), read_held(folder, "cache.path"):
        with pytest.raises(Busy, match="another process is reading") as busy:
            taken(folder)
        assert busy.value.readers
    with held(folder, "run", "output", "training in"):
        with pytest.raises(Busy, match=r"cache\.path: another process is writing to"), read_held(folder, "cache.path"):
            pass
        with pytest.raises(Busy) as busy:
            taken(folder)
        assert not busy.value.readers
    with read_held(tmp_path / "nowhere", "cache.path"):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom c2r.storage import held\n"
        "with held(pathlib.Path(sys.argv[1]), 'run', 'output', 'training in'):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Busy):
        taken(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    taken(tmp_path / "run")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(handle: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    with held(tmp_path / "run", "run", "output", "training in", said.append):
        assert marked(tmp_path / "run", "run")
    assert len(said) == 1
    assert "No locks available" in said[0]
