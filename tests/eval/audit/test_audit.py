"""The audit of SAE folders of any library, from the command line to a page that opens offline."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from c2r.cli import main
from c2r.eval.audit.findings import findings, look
from c2r.report.audit import print_audit, write_audit
from c2r.sae.model import SAE


@pytest.fixture
def foreign(tiny_run: dict[str, Path]) -> Path:
    """A folder as SAELens writes it, without our section."""
    folder = tiny_run["c2r"]
    config = json.loads((folder / "cfg.json").read_text())
    del config["c2r"]
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


class Page(HTMLParser):
    """Collects the text, and sees that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """SVG's lines close themselves."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_anybodys_sae_through_the_command_line(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<script>alert('x & y')</script> and [bold]words[/] " * 40)
    main(["audit", str(foreign), "--path", str(text), "--tokens", "600", "--out", str(tmp_path / "out")])
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "out" / "c2r_audit.json").read_text())
    topics = [finding["topic"] for finding in result["eval_result_details"]]
    assert topics == [
        "reconstruction", "sparsity", "shrinkage", "dead latents", "dense latents", "near-duplicates", "co-firing",
        "consistency penalty", "decoder norms",
    ]  # fmt: skip
    file = (tmp_path / "out" / "c2r_audit.html").read_text()
    page = Page()
    page.feed(file)
    assert page.open == []
    for finding in result["eval_result_details"]:
        for key in ("topic", "says", "means"):
            assert " ".join(finding[key].split()) in printed
            assert finding[key] in page.text
    for line in result["eval_result_unstructured"]["not_looked_at"]:
        assert line in printed
        assert line in page.text
    assert "http" not in file  # nothing is fetched
    assert "<script" not in file
    assert file.count("<svg") == 3
    pairs = result["eval_result_unstructured"]["pairs"]
    assert pairs
    assert all(f"i = {pair['latents'][0]}, j = {pair['latents'][1]}" in page.text for pair in pairs)
    assert not any("trained on (" in line for line in result["eval_result_unstructured"]["not_looked_at"])


def test_python_source_is_named_as_strange_to_a_foreign_sae(foreign: Path, tmp_path: Path) -> None:
    main(["audit", str(foreign), "--tokens", "300"])
    folder = foreign.parent / "evaluations"
    first = json.loads((folder / "c2r_audit.json").read_text())["eval_result_unstructured"]["not_looked_at"][0]
    assert "this is Python source" in first
    assert (folder / "c2r_audit.html").is_file()


def test_a_dictionary_that_never_fires_has_a_page(tmp_path: Path) -> None:
    rows = torch.eye(8)
    sae = SAE(-rows, torch.zeros(8), rows, torch.zeros(8), architecture="standard").requires_grad_(False)
    found = findings(look(sae, torch.rand(50, 8)))
    empty = {"low": 0, "high": 1, "counts": [0] * 3}
    result = {
        "sae_lens_id": "x<y",
        "sae_cfg_dict": {"architecture": "standard", "d_sae": 8},
        "eval_config": {
            "model": {"name": "m", "layer": 0, "hook": "resid_post"},
            "data": {"path": None, "source": "stdlib"},
            "held_out": True,
        },
        "eval_result_metrics": {"audit": {"max_cos_random_floor": 0.5}},
        "eval_result_details": [finding._asdict() for finding in found],
        "eval_result_unstructured": {
            "pairs": [], "not_looked_at": ["a <b>"], "log10_density": empty, "max_cos": empty, "phi": empty
        },
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(result))
    write_audit(tmp_path / "a.html", tmp_path / "a.json")
    page = Page()
    page.feed((tmp_path / "a.html").read_text())
    assert "c2r audit: x<y" in page.text
    assert "a <b>" in page.text
    assert "none" in page.text
    print_audit(tmp_path / "a.json")


def test_text_that_would_spoil_the_page_is_shown_as_signs(foreign: Path, tmp_path: Path) -> None:
    """NUL, escape sequences and marks that turn text around; words that run from right to left stay, set apart."""
    config = json.loads((foreign / "cfg.json").read_text())
    config["metadata"]["dataset_path"] = "a\x1b[31m\u202eb"
    (foreign / "cfg.json").write_text(json.dumps(config))
    text = tmp_path / "text.jsonl"
    text.write_text((json.dumps({"text": "abc \x00 \x07 \u202e שלום \u2066 " * 20}) + "\n") * 3)
    main(["audit", str(foreign), "--path", str(text), "--tokens", "600", "--out", str(tmp_path / "out")])
    body = (tmp_path / "out" / "c2r_audit.html").read_text()
    assert not set(body) & set("\x00\x07\x1b\u202e\u2066")
    assert "␀" in body
    assert body.count("<bdi>") == body.count("</bdi>") > 0
    result = json.loads((tmp_path / "out" / "c2r_audit.json").read_text())
    result["eval_result_unstructured"]["not_looked_at"] = ["a\x1b[31m\u202eb \ud800"]
    (tmp_path / "b.json").write_text(json.dumps(result))
    console = Console(record=True, width=200)
    print_audit(tmp_path / "b.json", console)
    write_audit(tmp_path / "b.html", tmp_path / "b.json")
    for shown in (console.export_text(), (tmp_path / "b.html").read_text()):
        assert "a␛[31m⟨U+202E⟩b ⟨U+D800⟩" in shown


def test_mistakes(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        ([str(foreign / "none")], "not an SAE folder"),
        ([str(foreign), "--tokens", "0"], "--tokens: Input should be greater than or equal to 1 (got 0)"),
        ([str(foreign), "--source", "files"], "path: nothing given"),
        ([str(foreign), "--model", "nowhere/such"], "model.name: cannot load 'nowhere/such'"),
    ):
        with pytest.raises(SystemExit):
            main(["audit", *arguments])
        assert says in capsys.readouterr().err
