"""Reference pages made from the code: every key of the configuration, every option of the command line.

mkdocs runs this file as a hook. It fills two markers, `<!-- generated: configuration -->` and
`<!-- generated: command-line -->`, and makes a page of the notebook in `examples/`. Without mkdocs,

    python docs/generate.py configuration
    python docs/generate.py command-line

print these parts as Markdown.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).parents[1]
NOTEBOOK = "guides/quickstart.md"
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def on_files(files: Any, config: Any) -> Any:
    """Add the notebook's page to those that mkdocs has found."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, NOTEBOOK, content=notebook(ROOT / "examples" / "quickstart.ipynb")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the markers of a page."""
    for name, make in PARTS.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def notebook(path: Path) -> str:
    """A notebook's cells as Markdown, without outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    parts.insert(1, f"This page is the notebook `examples/{path.name}`, without its outputs.")
    return "\n\n".join(parts) + "\n"


def configuration() -> str:
    """A run's YAML section by section, then the settings of evaluations."""
    from c2r.config.evaluations import EvaluationConfig
    from c2r.config.run import RunConfig

    return "\n\n".join(
        [
            "## The file",
            table(RunConfig, ""),
            *sections(RunConfig, ""),
            "## Settings of evaluations",
            inspect.cleandoc(EvaluationConfig.__doc__ or ""),
            "`c2r.evaluate` takes them by name. `c2r eval` has options for most, and its `--set` reaches all of them: "
            "`--set absorption.seeds=5`.",
            table(EvaluationConfig, "evaluation"),
            *sections(EvaluationConfig, "", "evaluation."),
        ]
    )


def sections(config: Any, where: str, prefix: str = "") -> Iterator[str]:
    """The sections within a section, each with a heading, its docstring and its keys; those within them follow.

    Arguments:
        where: the outer section's place in the YAML, empty for the whole file.
        prefix: what links to these keys begin with.
    """
    from c2r.config.base import Frozen

    for name, field in config.model_fields.items():
        place = f"{where}.{name}" if where else name
        for inner in classes_of(field.annotation):
            choices = choices_of(inner)
            known = bool(choices) and name == "data"
            anchor = f"{prefix}{place}.synthetic" if known else prefix + place
            shared = [base for base in inner.__mro__[1:] if base in config.__mro__ and base not in Frozen.__mro__]
            yield f"## `{place}`{': known features' if known else ''} {{ #{anchor} }}"
            yield inspect.cleandoc(inner.__doc__ or "")
            if shared:
                yield f"It also takes the keys of `{where}` from `source` to `held_out`."
            yield table(inner, anchor, shared[0] if shared else None)
            for kind, choice in choices.items():
                yield f"### `{'preset' if known else 'method'}: {kind}` {{ #{place}.{kind} }}"
                yield inspect.cleandoc(choice.__doc__ or "")
                yield table(choice, f"{place}.{kind}", inner)
            yield from sections(inner, place, prefix)


def classes_of(annotation: Any) -> list[Any]:
    """The configuration classes in a type."""
    from c2r.config.base import Frozen

    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        return [annotation]
    return [found for part in get_args(annotation) for found in classes_of(part)]


def first_lines(annotation: Any) -> str:
    """What the sections in a type say of themselves, for a key that says nothing."""
    return " Or: ".join(inspect.cleandoc(inner.__doc__ or "").partition("\n")[0] for inner in classes_of(annotation))


def choices_of(config: Any) -> dict[str, Any]:
    """The classes of which a section is one: a class for each method or preset."""
    from c2r.config.known_features import PRESETS, SyntheticConfig
    from c2r.config.saes import SECTIONS, SAEConfig

    return {SAEConfig: SECTIONS, SyntheticConfig: PRESETS}.get(config, {})


def table(config: Any, place: str, common: Any = None) -> str:
    """The keys of a section with type, default and docstring.

    Arguments:
        place: the section's place in the YAML; keys get links of this form.
        common: a class whose keys are listed elsewhere: only keys that it lacks, or has with another default, are here.
    """
    rows, documented = [], docstrings(config)
    for name, field in config.model_fields.items():
        shared = None if common is None else common.model_fields.get(name)
        if shared is not None and (name in ("method", "preset") or default_of(shared) == default_of(field)):
            continue
        key = field.alias or name
        link = f"{place}.{key}" if place else key
        cells = [
            f"[`{key}`](#{link})" + ("" if classes_of(field.annotation) else f"{{ #{link} }}"),
            describe(field.annotation, field.metadata),
            default_of(field),
            " ".join((documented.get(name) or first_lines(field.annotation)).split()),
        ]
        rows.append(row(cells))
    if not rows:
        return "It has no keys of its own."
    return "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows)


def row(cells: list[str]) -> str:
    """A row of a Markdown table. Vertical bars are escaped, except in code, where Markdown would show the backslash."""
    return "| " + " | ".join(re.sub(r"(`[^`]*`)|\|", lambda bar: bar[1] or "\\|", cell) for cell in cells) + " |"


def describe(annotation: Any, metadata: Any = ()) -> str:
    """A type in words: `whole number ≥ 1 or null`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0], args[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        said = dict.fromkeys(describe(part) for part in args)
        return " or ".join([part for part in said if part != "null"] + ["null"] * ("null" in said))
    if origin in (list, tuple):
        return "list of sections" if classes_of(args[0]) else f"list of {describe(args[0])}"
    if classes_of(annotation):
        return "section"
    limits = [part for given in metadata for part in getattr(given, "metadata", [given])]
    shown = [
        f"{sign} {getattr(part, name):g}" for part in limits for name, sign in _BOUNDS.items() if hasattr(part, name)
    ]
    return " ".join(
        [_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation))), ", ".join(shown)]
    ).strip()


def default_of(field: Any) -> str:
    """The default as one writes it in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if classes_of(type(value)):
        return "its defaults"
    if isinstance(value, str | Path):
        return f"`{value}`"
    return f"`{json.dumps(value)}`"


def docstrings(config: type) -> dict[str, str]:
    """The string below each field, of the class itself or the nearest base that has the field."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not base.__module__.startswith("c2r."):
            continue
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[statement.target.id] = text.value
    return found


def command_line() -> str:
    """Every command: usage, docstring, arguments and options."""
    from c2r.cli import COMMANDS

    return "\n\n".join(part for name, function in COMMANDS.items() for part in command(name, function))


def command(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """One command of the command line, made from its function's signature and docstring."""
    about, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
    said = arguments(rest)
    hints = typing.get_type_hints(function, include_extras=True)
    positional, options = [], []
    for key, parameter in inspect.signature(function).parameters.items():
        if str(parameter.annotation).startswith("Positional"):
            many = "tuple" in str(parameter.annotation)
            positional.append(f"{key.upper().removesuffix('S')} [...]" if many else key.upper())
            kind = describe(hints[key]).removeprefix("list of ")
            options.append(row([f"`{positional[-1]}`", kind, "required", said[key]]))
            continue
        flag = f"[`--{key.replace('_', '-')}`](#{name}.{key}){{ #{name}.{key} }}"
        metavar = next((found for part in get_args(hints[key]) if (found := getattr(part, "metavar", None))), None)
        value = parameter.default
        if metavar:
            kind, default = f"`{metavar}`, one or more", ""
        elif isinstance(value, bool):
            kind, default = "flag", "on" if value else "off"
        else:
            kind = describe(hints[key]).removesuffix(" or null")
            default = "" if value is None else f"`{value}`"
        options.append(row([flag, kind, default, said[key]]))
    yield f"## `c2r {name}`"
    yield f"```sh\nc2r {' '.join([name, *positional])} [options]\n```"
    yield about.strip()
    yield "| | type | default | |\n|---|---|---|---|\n" + "\n".join(options)


def arguments(text: str) -> dict[str, str]:
    """`name: description` lines of a docstring; a description may go on in deeper lines."""
    said: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n" + text).splitlines():
        if line and not line.startswith(" "):
            name, _, description = line.partition(": ")
            said[name] = description
        elif line:
            said[name] += " " + line.strip()
    return said


PARTS: dict[str, Callable[[], str]] = {"configuration": configuration, "command-line": command_line}

if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in PARTS):
        raise SystemExit(f"usage: python docs/generate.py {' | '.join(PARTS)}")
    print(PARTS[sys.argv[1]]())
