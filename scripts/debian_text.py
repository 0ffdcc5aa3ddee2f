"""English text from Debian's documentation packages, as JSON lines: about 140 MB, no download but the packages.

    mkdir packages && cd packages
    apt-get download dict-gcide python3.11-doc linux-doc-6.1 wordnet-base manpages manpages-dev postgresql-doc-15 \
        dict-foldoc libreoffice-help-en-us apache2-doc fortunes dict-jargon debian-handbook
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done          # nothing is installed
    python scripts/debian_text.py packages/unpacked text.jsonl

Each line is `{"text": ..., "source": ...}`. The order of the documents is shuffled once and depends on the packages
alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

DICTIONARY_CHARACTERS = 6_000
"""Length of a document made of dictionary entries, at least."""
GLOSSES = 40
"""WordNet's entries per document."""
SHORTEST = 200
"""Documents with fewer characters are left out."""
_BLOCKS = {
    "p",
    "div",
    "li",
    "dt",
    "dd",
    "tr",
    "table",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "br",
    "section",
    "ul",
}
_SILENT = {"script", "style", "nav", "head", "footer", "header"}


class _Text(HTMLParser):
    """The words of a page; menus, scripts and styles left out."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in _SILENT
        self.verbatim += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in _SILENT
        self.verbatim -= tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def of_html(page: str) -> str:
    """The text of a page, a block per line."""
    parser = _Text()
    parser.feed(page)
    return tidy("".join(parser.parts).replace("¶", ""))


def of_man(source: str) -> str:
    """The words of a manual page: requests are dropped, their arguments stay."""
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", '."')) or re.match(r"\.(ds|de|if|ie|el|nr|so|ft|in|ta|ad|TS|TE)\b", line):
            continue
        found = re.match(r"\.\s*(\w+)\s*(.*)", line)
        if found:
            request, line = found[1], found[2].replace('"', "")
            if request in ("SH", "SS"):
                line = f"\n{line}"
            elif request in ("PP", "TP", "P", "IP", "LP", "HP"):
                line = f"\n{line}" if request == "IP" else ""
            elif request in ("BR", "IR", "BI", "RB", "RI", "IB"):  # words of changing faces are written together
                line = "".join(line.split(" ")) if "(" in line else line
        line = re.sub(r"\\f(\[\w+\]|\w)|\\s[-+]?\d|\\[&/,|^:%]", "", line)
        line = re.sub(
            r"\\\((\w\w)|\\\[(\w+)\]", lambda m: {"aq": "'", "dq": '"', "en": "-", "em": "-"}.get(m[1], ""), line
        )
        lines.append(line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " "))
    return tidy("\n".join(lines))


def tidy(text: str) -> str:
    """No spaces at the ends of lines, and at most one empty line in a row."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r", ""))
    return re.sub(r"\n\s*\n\s*(?=\n)", "\n", re.sub(r"\n{3,}", "\n\n", text)).strip()


def read(path: Path) -> str:
    """A file, compressed or not; bytes that are not UTF-8 are Latin-1."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def of_dictionary(text: str) -> Iterator[str]:
    """Entries joined to documents of some length."""
    held: list[str] = []
    for entry in re.split(r"\n\s*\n(?=\S)", text):
        held.append(entry)
        if sum(map(len, held)) >= DICTIONARY_CHARACTERS:
            yield tidy("\n\n".join(held))
            held = []
    yield tidy("\n\n".join(held))


def of_wordnet(text: str) -> Iterator[str]:
    """`word, word: gloss`, forty to a document, in a shuffled order, since neighbours there are alike."""
    entries = []
    for line in text.splitlines():
        fields, _, gloss = line.partition(" | ")
        if line.startswith("  ") or not gloss:
            continue
        parts = fields.split()
        words = [parts[4 + 2 * i].replace("_", " ") for i in range(int(parts[3], 16))]
        entries.append(f"{', '.join(words)}: {gloss.strip()}")
    random.Random(0).shuffle(entries)
    for first in range(0, len(entries), GLOSSES):
        yield "\n".join(entries[first : first + GLOSSES])


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """Source and text of each document under an unpacked tree."""
    share = root / "usr" / "share"
    for path in sorted((share / "dictd").glob("*.dict.dz")):
        yield from ((path.name.split(".")[0], text) for text in of_dictionary(read(path)))
    for path in sorted((share / "wordnet").glob("data.*")):
        yield from (("wordnet", text) for text in of_wordnet(read(path)))
    for path in sorted((share / "games" / "fortunes").glob("*")):
        if path.suffix != ".dat" and path.is_file():
            yield "fortunes", tidy(read(path))
    for path in sorted((share / "man").glob("man*/*.gz")):
        yield "man", of_man(read(path))
    for path in sorted(share.glob("doc/python3*/html/**/*.txt")):
        yield "python", tidy(read(path))
    for path in sorted(share.glob("doc/linux-doc-*/html/**/*.txt")):
        yield "linux", tidy(read(path))
    pages = (
        "doc/postgresql-doc-*/html/*.html",
        "libreoffice/help/en-US/**/*.html",
        "doc/apache2-doc/manual/en/**/*.html",
        "doc/debian-handbook/html/en-US/*.html",
    )
    for pattern in pages:
        for path in sorted(share.glob(pattern)):
            source = path.relative_to(share).parts
            yield source[1] if source[0] == "doc" else source[0], of_html(read(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="where the packages were unpacked")
    parser.add_argument("out", type=Path, help="the JSON lines to write")
    args = parser.parse_args()
    found = {text: source for source, text in documents(args.root) if len(text) >= SHORTEST}  # each text once
    if not found:
        raise SystemExit(f"{args.root}: no documentation found; unpack the packages there first")
    order = list(found.items())
    random.Random(0).shuffle(order)
    size: Counter[str] = Counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for text, source in order:
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
            size[source] += len(text)
    for source, characters in size.most_common():
        print(f"{characters / 1e6:6.1f} MB  {source}")
    print(f"{sum(size.values()) / 1e6:6.1f} MB  in {len(order):,} documents")


if __name__ == "__main__":
    main()
