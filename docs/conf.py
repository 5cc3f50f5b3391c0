"""The site: Sphinx with MyST (Markdown), furo, and notebooks shown as they were run. Built with warnings as errors by `make docs`.

Sphinx rather than mkdocs-material: autodoc reads the docstrings, the link check and the glossary are its own, and
mkdocs-material has ended its active development.
"""

from __future__ import annotations

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
copyright = author  # noqa: A001
version = release = deq_compile.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"deq_compile {release}"
html_static_path: list[str] = []
exclude_patterns = ["_build", "README.md.in", "printed.json"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|collections|typing|contextlib)\..*|Tensor|nn\..*|optional|S|T")]  # no inventories here

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # pages' blocks and notebooks are run by the suite, not by the build

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


def fill(app: Any, name: str, source: list[str]) -> None:
    """Figures into a page; those that other commands write whole are left as they are."""
    if (HERE / f"{name}.md").exists() and name not in render.GENERATED:
        source[0] = render.fill(source[0])


def setup(app: Any) -> None:
    pictures.draw_all(HERE / "images")
    app.connect("source-read", fill)
