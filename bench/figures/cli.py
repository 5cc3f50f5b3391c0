"""``python -m bench figures``: README.md from its source, with every number from a committed result.

--run first runs the code blocks of the README and of the site's pages, and keeps what the named ones print; --check changes
nothing and fails where README.md is not what its source gives.
"""

from __future__ import annotations

import argparse
import json
import sys

from . import blocks, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", action="store_true", help="run the code blocks and keep what they print")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where README.md is stale")


def run_blocks() -> None:
    """Every page, one after the other; what is printed is written as it comes."""
    known = json.loads(render.PRINTED.read_text()) if render.PRINTED.exists() else {}
    for page in [render.README_SOURCE, *render.pages()]:
        name = render.name_of(page)
        print(f"{name} …", flush=True)
        known |= {f"{name}/{block}": text for block, text in blocks.run(page).items()}
        render.PRINTED.write_text(json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n")


def main(args: argparse.Namespace) -> int:
    if args.run:
        run_blocks()
    wanted = render.readme()
    if args.check:
        if render.README.read_text() != wanted:
            print("README.md is not what docs/README.md.in gives; fix: python -m bench figures", file=sys.stderr)
            return 1
        return 0
    render.README.write_text(wanted)
    return 0
