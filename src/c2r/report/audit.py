"""The findings of an audit, read from its result file: in the terminal and as a self-contained HTML page."""

from __future__ import annotations

import html
import json
import unicodedata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from c2r.report.html import PAGE, step_chart
from c2r.storage import write_text

_CHARTS = {
    "log10_density": "log10 firing density of alive latents",
    "max_cos": "Nearest-neighbour cosine (dashed: random directions)",
    "phi": "Co-firing φ of nearest neighbours",
}


def print_audit(result: Path, console: Console | None = None) -> None:
    """Print the findings; a `!` marks those that violate a rule of thumb."""
    console = console or Console()
    found = json.loads(result.read_text(encoding="utf-8"))
    console.print(f"\n[bold]{_terminal(found['sae_lens_id'])}[/]  {_terminal(_what(found))}", highlight=False)
    for finding in found["eval_result_details"]:
        mark = "[bold red]![/]" if finding["marked"] else " "
        console.print(f"\n{mark} [bold]{_terminal(finding['topic'])}[/]")
        console.print(f"  {_terminal(finding['says'])}\n  [dim]{_terminal(finding['means'])}[/]", highlight=False)
    console.print("\n[bold]not examined[/]")
    for line in found["eval_result_unstructured"]["not_looked_at"]:
        console.print(f"  {_terminal(line)}", highlight=False)
    console.print()


def write_audit(path: Path, result: Path) -> None:
    """Write the page: findings, distributions, neighbouring latents with the text they fire on, what is not covered."""
    found = json.loads(result.read_text(encoding="utf-8"))
    extra = found["eval_result_unstructured"]
    floor = found["eval_result_metrics"]["audit"]["max_cos_random_floor"]
    rows = "".join(_finding(finding) for finding in found["eval_result_details"])
    charts = "".join(
        step_chart(caption, {"": extra[key]}, floor if key == "max_cos" else None) for key, caption in _CHARTS.items()
    )
    missing = "".join(f"<li>{_page(line)}</li>" for line in extra["not_looked_at"])
    body = (
        f"<p>{_page(_what(found))}</p>{rows}{charts}"
        f"<h2>Nearest neighbours to read</h2><p><small>j is the nearest neighbour of latent i. Shown: pairs with the "
        f"highest cosine and the highest φ, and text around the tokens on which each latent is strongest.</small></p>"
        f"{''.join(_pair(pair) for pair in extra['pairs']) or '<p>none</p>'}"
        f"<h2>Not examined</h2><ul>{missing}</ul>"
    )
    write_text(path, PAGE.format(title=_page(f"c2r audit: {found['sae_lens_id']}"), body=body), "out")


def _what(found: dict[str, Any]) -> str:
    """The SAE and the text, on one line."""
    sae, config = found["sae_cfg_dict"], found["eval_config"]
    model, text = config["model"], config["data"]
    held_out = " (held-out part)" if config["held_out"] else ""
    return (
        f"{sae['architecture']}, {sae['d_sae']:,} latents on {model['name']}, block {model['layer']} {model['hook']}; "
        f"text: {text['path'] or text['source']}{held_out}{_unfinished(found)}"
    )


def _unfinished(found: dict[str, Any]) -> str:
    """A warning if training was stopped early, else empty."""
    summary = found["eval_result_unstructured"].get("summary", {})
    seen, wanted = (summary.get(key) for key in ("trained_tokens", "train_tokens"))
    return "" if seen is None else f"; UNFINISHED: it was trained on {seen:,} of {wanted:,} tokens"


def _finding(finding: dict[str, Any]) -> str:
    color = "#e45756" if finding["marked"] else "#54a24b"
    return (
        f'<h3><span style="color:{color}">■</span> {_page(finding["topic"])}</h3>'
        f"<p>{_page(finding['says'])}<br><small>{_page(finding['means'])}</small></p>"
    )


def _pair(pair: dict[str, Any]) -> str:
    i, j = pair["latents"]
    phi = "–" if pair["phi"] is None else f"{pair['phi']:.3f}"
    head = (
        f"i = {i}, j = {j}: cosine {pair['cosine']:.3f}, φ {phi}, Jaccard {pair['jaccard']:.3f}, "
        f"P(j|i) {pair['p_j_given_i']:.3f}, P(i|j) {pair['p_i_given_j']:.3f}, "
        f"density {pair['densities'][0]:.4f} and {pair['densities'][1]:.4f}"
    )
    texts = ""
    for name, found in zip("ij", pair["snippets"], strict=True):
        for snippet in found:
            before, token, after = (_page(_visible(snippet[key])) for key in ("before", "token", "after"))
            # <bdi>: right-to-left text does not change the order of what surrounds it.
            code = f"<bdi><code>{before}<b>{token}</b>{after}</code></bdi>"
            texts += f"<br>{name} <small>{snippet['activation']:.2f}</small> {code}"
    return f"<p>{_page(head)}{texts}</p>"


def _visible(text: str) -> str:
    """Replace white space that HTML would collapse by visible characters."""
    return text.replace("\n", "↵").replace("\t", "→").replace("  ", "··")


def _page(text: str) -> str:
    """Untrusted text, escaped for HTML."""
    return html.escape("".join(map(_sign, text)))


def _terminal(text: str) -> str:
    """Untrusted text, escaped for rich."""
    return escape("".join(map(_sign, text)))


def _sign(letter: str) -> str:
    """The character, or a visible stand-in for a control or format character: those break HTML or reorder text."""
    code = ord(letter)
    if code < 32 or code == 127:
        return chr(0x2400 + (code if code < 32 else 33))  # Unicode's control pictures
    kind = unicodedata.category(letter)
    joins = letter in ("\u200c", "\u200d")  # joiners, which words and emoji contain
    return f"⟨U+{code:04X}⟩" if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and not joins) else letter
