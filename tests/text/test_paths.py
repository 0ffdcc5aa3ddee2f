"""Resolving paths to files: an existing file has priority over a glob; links are followed."""

import os
from pathlib import Path

import pytest

from c2r.config.text import DataConfig
from c2r.eval.probing.labelled import check_labelled
from c2r.text.paths import file_paths
from c2r.text.sources import check_source

LINE = '{"text": "a", "label": "b"}\n'


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE)


def names(pattern: Path | str) -> list[str]:
    return [path.name for path in file_paths(str(pattern))]


def test_what_exists_is_that_file(tmp_path: Path) -> None:
    folder = tmp_path / "corpus [v1]" / "a*b? {x} ~"
    write(folder / "part[1].jsonl", folder / "part1.jsonl", folder / "part2.jsonl", tmp_path / "corpus v" / "x.jsonl")
    assert names(folder / "part[1].jsonl") == ["part[1].jsonl"]
    assert names(folder) == ["part1.jsonl", "part2.jsonl", "part[1].jsonl"]
    assert names(folder / "part?.jsonl") == ["part1.jsonl", "part2.jsonl"]
    assert names(folder / "part[12].jsonl") == ["part1.jsonl", "part2.jsonl"]
    assert names(folder / "*.jsonl") == ["part1.jsonl", "part2.jsonl", "part[1].jsonl"]
    assert names(tmp_path / "corpus [v1]" / "**" / "part[1]*") == ["part1.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["part1.jsonl", "part2.jsonl", "part[1].jsonl", "x.jsonl"]
    (folder / "part1.jsonl").unlink()
    assert names(folder / "part[1]*") == ["part[1].jsonl"]  # as a set of characters it would match nothing
    check_labelled(str(folder / "part[1].jsonl"))


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "home" / "text" / "a.jsonl", tmp_path / "here" / "b[2].jsonl", tmp_path / "here" / "~" / "c.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    assert names("~/text/a.jsonl") == names("~/text") == names("~/text/*.jsonl") == ["a.jsonl"]
    assert names("b[2].jsonl") == names("./b[2].jsonl") == names("*.jsonl") == ["b[2].jsonl"]
    assert names("~/c.jsonl") == ["c.jsonl"]  # a file with exactly that name
    with pytest.raises(ValueError, match=r"no file matches '~nobody-of-that-name/x\.txt'"):
        file_paths("~nobody-of-that-name/x.txt")
    check_source(DataConfig(source="hf", path="~/text"))


def test_links(tmp_path: Path) -> None:
    write(tmp_path / "real" / "deep" / "a.jsonl", tmp_path / "one.jsonl")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "real")
    (folder / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "deep" / "loop").symlink_to(folder)
    (folder / "one.jsonl").symlink_to(tmp_path / "one.jsonl")
    assert names(folder) == ["a.jsonl", "one.jsonl"]  # each folder once
    (folder / "lost.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    for pattern in (folder, folder / "lost.jsonl", folder / "*.jsonl"):
        with pytest.raises(ValueError, match=r"lost\.jsonl is a broken symbolic link"):
            file_paths(str(pattern))


def test_endings_in_capitals_and_folders_among_matches(tmp_path: Path) -> None:
    write(tmp_path / "A.JSONL", tmp_path / "b.TXT", tmp_path / "deep" / "c.jsonl")
    assert names(tmp_path) == ["A.JSONL", "b.TXT", "c.jsonl"]
    assert names(tmp_path / "**") == ["A.JSONL", "b.TXT", "c.jsonl"]
    check_source(DataConfig(source="files", path=str(tmp_path / "A.JSONL")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", tmp_path / "deep" / "b.jsonl")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(ValueError, match=r"data\.path: .*a\.jsonl cannot be read: permission denied"):
        file_paths(str(tmp_path))
    (tmp_path / "a.jsonl").chmod(0o600)
    (tmp_path / "deep").chmod(0)
    with pytest.raises(ValueError, match=r"data\.path: .*deep cannot be read"):
        file_paths(str(tmp_path))
    (tmp_path / "deep").chmod(0o700)
