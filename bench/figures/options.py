"""The options, as a table: names, defaults and meanings from the docstring of `Options`, which a test compares with the rules."""

from __future__ import annotations

import dataclasses
import inspect
import re

from deq_compile import Options

from .text import markdown


def meanings() -> dict[str, tuple[str, str]]:
    """Option -> (default, meaning), as the docstring of `Options` has them.

    Raises:
        ValueError: the docstring and the fields do not name the same options.
    """
    lines = inspect.cleandoc(Options.__doc__ or "").splitlines()
    edges = [number for number, line in enumerate(lines) if re.match(r"=+ =+ =+", line)]
    columns = [match.start() for match in re.finditer(r"=+", lines[edges[0]])]
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines[edges[1] + 1 : edges[2]]:
        option, default, meaning = (line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True))
        if option:
            name = option.strip("`")
            found[name] = [default, meaning]
        else:
            found[name][1] += " " + meaning
    fields = {field.name for field in dataclasses.fields(Options)}
    if set(found) != fields:
        raise ValueError(f"options: expected {sorted(fields)} in the docstring of Options, got {sorted(found)}")
    return {name: (default, meaning) for name, (default, meaning) in found.items()}


def table() -> str:
    """All options: name, default, meaning."""
    lines = [
        [f"`{name}`", f"`{default}`", meaning.replace("``", "`").replace("|", "\\|")]
        for name, (default, meaning) in meanings().items()
    ]
    return markdown(["option", "default", "meaning"], lines)
