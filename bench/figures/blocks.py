"""Code blocks of a page: found, run in order in one namespace, and what they print."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import linecache
import os
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<said>(?:<!--[^>]*-->\n)*)```python\n(?P<code>.*?)^```", re.M | re.S)
_SAID = re.compile(r"<!-- (?P<word>needs|block): (?P<value>.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of Python.

    code    what stands in it
    line    the number of its first line in the page
    name    what a page calls it, to show what it prints (``<!-- block: NAME -->`` above it)
    needs   modules without which it is not run (``<!-- needs: a, b -->``)
    """

    code: str
    line: int
    name: str = ""
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [module for module in self.needs if importlib.util.find_spec(module) is None]


def of(text: str) -> list[Block]:
    """All blocks of a page, in order."""
    found = []
    for match in _FENCE.finditer(text):
        said = {part["word"]: part["value"] for part in _SAID.finditer(match["said"])}
        needs = tuple(word.strip() for word in said.get("needs", "").split(",") if word.strip())
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["code"], line, said.get("block", ""), needs))
    return found


def run(page: Path, text: str | None = None) -> dict[str, str]:
    """Run every block of a page; what the named ones print, by name.

    They run in an empty folder, which is removed. A traceback names the page and the line there. The namespace is a module of its
    own, found under the page's name as long as it runs, so that classes in it can be pickled and their source is found.

    Raises:
        whatever a block raises.
    """
    text = page.read_text() if text is None else text
    module = types.ModuleType(page.name.split(".")[0].replace("-", "_"))
    module.__file__ = file = f"{module.__name__}.py"
    printed: dict[str, str] = {}
    code = _as_source(text)
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    sys.modules[module.__name__] = module
    before = os.getcwd()
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # what a block writes goes there
            for block in of(text):
                if block.missing():
                    continue
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * (block.line - 1) + block.code, file, "exec"), vars(module))
                if block.name:
                    printed[block.name] = out.getvalue()
            os.chdir(before)
    finally:
        os.chdir(before)
        del sys.modules[module.__name__]
    return printed


def _as_source(text: str) -> str:
    """The page with all that is no code left blank, so that line numbers are the page's."""
    lines = [""] * (text.count("\n") + 1)
    for block in of(text):
        for offset, line in enumerate(block.code.splitlines()):
            lines[block.line - 1 + offset] = line
    return "\n".join(lines) + "\n"


def shape(printed: str) -> str:
    """What two runs of a block have in common: numbers, and the spaces that align them, may differ."""
    text = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", printed)
    return re.sub(r"[ \t]+", " ", text).strip()
