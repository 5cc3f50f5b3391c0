"""``python -m bench figures``: README.md from its source, with every number from a committed result.

--run first runs the code blocks of the README and of the site's pages, and keeps what the named ones print; --notebooks runs the
notebooks; --check changes nothing and fails where README.md is not what its source gives.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

from . import blocks, notebooks, render, sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", action="store_true", help="run the code blocks and keep what they print")
    parser.add_argument("--notebooks", action="store_true", help="run the notebooks of the site")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where README.md is stale")


def printed() -> Iterator[dict[str, str]]:
    """What the named blocks of each page print, and then the examples that stand on one."""
    for page in [render.README_SOURCE, *render.pages()]:
        name = render.name_of(page)
        print(f"{name} …", flush=True)
        yield {f"{name}/{block}": text for block, text in blocks.run(page).items()}
    for script in render.SCRIPTS:
        print(f"examples/{script}.py …", flush=True)
        command = [sys.executable, f"examples/{script}.py"]
        out = subprocess.run(command, cwd=sources.ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        yield {f"examples/{script}": out.replace(f"{sources.ROOT}/", "")}


def run_blocks() -> None:
    """Run all and keep what they print; each page is written as it comes."""
    known: dict[str, str] = {}
    for found in printed():
        known |= found
        render.PRINTED.write_text(json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n")


def main(args: argparse.Namespace) -> int:
    if args.run:
        run_blocks()
    for name in notebooks.NAMES if args.notebooks else ():
        print(f"{name}.ipynb …", flush=True)
        notebooks.run(name)
    wanted = render.readme()
    if args.check:
        if render.README.read_text() != wanted:
            print("README.md is not what docs/README.md.in gives; fix: python -m bench figures", file=sys.stderr)
            return 1
        return 0
    render.README.write_text(wanted)
    return 0
