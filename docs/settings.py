"""Writes docs/settings.md: every setting of the trainer, out of the signatures and docstrings that define them.

python docs/settings.py > docs/settings.md
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from docstring_parser import parse

from hpc_kfac.training.config import KINDS, RunSettings

HEAD = """# Settings

Written by `python docs/settings.py`. A run file is YAML, `key: value`; on the command line a setting is `--key value`,
and one of a named part is `--part.key value`. `hpc-kfac train --help` shows the same for the parts that a run chose."""


def rows(make: Callable[..., Any], given: str | None = None) -> Iterator[str]:
    """One table row for each argument."""
    described = {entry.arg_name: entry.description or "" for entry in parse(inspect.getdoc(make) or "").params}
    own = fields(make) if is_dataclass(make) else ()
    made = {field.name: field.default_factory for field in own if field.default_factory is not MISSING}
    for parameter in inspect.signature(make).parameters.values():
        if parameter.name in (given, "self", "length", "model"):
            continue
        value = made[parameter.name]() if parameter.name in made else parameter.default
        default = "required" if value is parameter.empty else repr(value)
        kind = str(parameter.annotation).replace("|", "\\|")
        text = " ".join(described.get(parameter.name, "").split()).replace("|", "\\|")
        yield f"| `{parameter.name}` | `{kind}` | `{default}` | {text} |"


def table(make: Callable[..., Any], given: str | None = None) -> str:
    """All arguments of a function or class; a line of its own where there is none."""
    body = list(rows(make, given))
    return "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *body]) if body else "No settings."


def default_of(key: str) -> str:
    """What is taken where none is named."""
    if key == "step_control":
        return "what the method wants (`method-table.md`), `orthogonal` for most"
    return f"`{KINDS[key].default}`"


def document() -> str:
    """The whole page."""
    parts = [HEAD, "## The run itself", table(RunSettings)]
    for key, kind in KINDS.items():
        choices = ", ".join(f"`{name}`" for name in kind.choices)
        choices += kind.words.removeprefix(", ".join(kind.choices))
        parts.append(f"## {key}\n\nOne of {choices}; default {default_of(key)}.")
        for name, make in kind.choices.items():
            if make is not None:
                summary = parse(inspect.getdoc(make) or "").short_description or ""
                parts += [f"### {key}: {name}\n\n{summary}", table(make, kind.given)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(document())
