"""The site: Sphinx with MyST (Markdown) and furo; notebooks are shown as they were run. `make docs`: warnings are errors.

Sphinx rather than mkdocs-material: autodoc reads the docstrings, the link check and the glossary are its own, and
mkdocs-material has ended its active development.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pictures  # noqa: E402

import deq_compile  # noqa: E402
from bench.figures import render  # noqa: E402

project = "deq_compile"
author = "the deq_compile authors"
copyright = author
version = release = deq_compile.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"deq_compile {release}"
html_static_path: list[str] = []
exclude_patterns = ["_build", "README.md.in", "printed.json"]
default_role = "code"  # `name` in a docstring
nitpicky = True
nitpick_ignore_regex = [  # what has no page here
    (
        "py:.*",
        r"(torch|collections|typing|contextlib|os)\..*|Tensor|nn\..*|optional|dict\[.*|Records|Figure"
        r"|deq_compile\.(api\.T|explicit\.S|config\.Config|watch\.rows\.Names)",
    )
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # pages' blocks and notebooks are run by the suite, not by the build

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


def fill(app: Any, name: str, source: list[str]) -> None:
    """Figures into a page; those that other commands write whole are left as they are."""
    if (HERE / f"{name}.md").exists() and name not in render.GENERATED:
        source[0] = render.fill(source[0])


def tidy(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as RST: |x| is a norm, and columns of names and meanings are field lists."""
    if edges := [number for number, line in enumerate(lines) if re.match(r"=+ =+", line)]:
        lines[edges[0] : edges[-1] + 1] = ["The options are listed under :doc:`options`."]
    found: list[str] = []
    for line in lines:
        line = re.sub(r"(``[^`]*``)|\|", lambda match: match[1] or r"\|", line)
        if entry := re.match(r"([a-z_]+(?:, [a-z_]+)*) {2,}(.+)$", line):
            if found and found[-1] and not found[-1].startswith((":", "    ")):
                found.append("")
            line = f":{entry[1]}: {entry[2]}"
        elif found and found[-1].startswith((":", "    ")) and line.startswith(" ") and what == "class":
            line = "    " + line.strip()
        found.append(line)
    lines[:] = found


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", tidy)
    pictures.draw_all(HERE / "images")
    app.connect("source-read", fill)
