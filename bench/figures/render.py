"""Pages with their figures filled in, by Jinja: ``{{ ... }}`` in a page calls a view of the committed results."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jinja2

from . import gradients, options, sources, steps, text

DOCS = sources.ROOT / "docs"
README, README_SOURCE = sources.ROOT / "README.md", DOCS / "README.md.in"
PRINTED = DOCS / "printed.json"  # what named blocks print, by page and block
SCRIPTS = ("language_model",)  # examples whose output stands on a page, as "examples/<name>"
GENERATED = {"forms", "reach"}  # written whole by their own commands
TABLES, MODELS, DEMO = "cpu-tables-2026-11-28", "cpu-tables-real-models", "demo"
RECYCLE = "cpu-recycle-2026-11-29"


def pages() -> list[Path]:
    """The pages of the site that are written by hand, sorted."""
    return sorted(path for path in DOCS.glob("**/*.md") if path.stem not in GENERATED)


@functools.cache
def environment() -> jinja2.Environment:
    """Unknown names are errors; views are called by module and name, as in ``{{ steps.wide(TABLES) }}``."""
    made = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    made.globals |= {"steps": steps, "gradients": gradients, "options": options, "results": sources, "text": text}
    made.globals |= {"TABLES": TABLES, "MODELS": MODELS, "DEMO": DEMO, "RECYCLE": RECYCLE, "printed": printed}
    made.filters |= {"times": text.times}
    return made


def printed(name: str) -> str:
    """What the block "page/name" prints, as a fenced block; from the committed file, which a test compares with a run.

    Raises:
        KeyError: no such block.
    """
    known: dict[str, str] = json.loads(PRINTED.read_text())
    if name not in known:
        raise KeyError(f"printed: expected one of {', '.join(known)}; got {name!r}. Fix: python -m bench figures --run")
    return f"```text\n{known[name].rstrip()}\n```"


def fill(source: str) -> str:
    """A page with its figures.

    Raises:
        jinja2.UndefinedError, KeyError, FileNotFoundError: a figure that there is not.
    """
    return environment().from_string(source).render()


def readme() -> str:
    """README.md as it should stand."""
    return fill(README_SOURCE.read_text())


def name_of(page: Path) -> str:
    """How `printed` calls a page: its path below docs, without suffixes; the README's is "README"."""
    return str(page.relative_to(DOCS)).split(".", 1)[0]
