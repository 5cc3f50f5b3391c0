"""``python -m bench reach``: public models, unmodified: what is found in them, how far off it is, and what a step costs.

--sources names a folder of clones, one a repository, called owner+name; what is missing from it is printed with the command that
fetches it, and its models are left out. Each model is run eagerly, through Inductor and through deq in processes of their own, in
turns, with a time limit; its row is written to --json at once, and --resume goes on after an interruption. The page --page is
made from that file; --table makes it without running anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine
from bench.tables.cli import header
from bench.tables.runs import ROOT

from . import child, conduct, sources, table
from .manifest import Model, models_of
from .ways import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sources", type=Path, help="folder of clones")
    parser.add_argument("--models", help="comma-separated names; default: all (their rows replace those in --json)")
    parser.add_argument("--drivers", default="bench.reach.drivers", help="module that lists the models (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the models and what is missing, and run nothing")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has")
    parser.add_argument("--limit", type=float, default=600, help="seconds an answer of a process may take (default %(default)g)")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "reach.json", help="rows (default %(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reach.md", help="the page (default %(default)s)")
    parser.add_argument("--table", action="store_true", help="make the page from --json instead of measuring")
    parser.add_argument("--logs", type=Path, help="keep what the processes print there")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a task as JSON: the child's own call


def product_commit() -> str:
    """The commit that last changed the compiler itself: what a row was measured with, whatever else has been committed since."""
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--abbrev=12", "--", "deq_compile", "kernels", "passes"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def chosen(drivers: str, names: str | None) -> list[Model]:
    known = {model.name: model for model in models_of(drivers)}
    if names is None:
        return list(known.values())
    if unknown := [name for name in names.split(",") if name not in known]:
        raise SystemExit(f"--models: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    return [known[name] for name in names.split(",")]


def runnable(models: list[Model], folder: Path) -> list[Model]:
    """Those whose code is there; of the others, what to do is printed."""
    for text in sources.missing(models, folder):
        print(text, file=sys.stderr)
    return [model for model in models if not sources.missing([model], folder)]


def stored(path: Path) -> Row:
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def write(args: argparse.Namespace, head: Row, rows: dict[str, Row]) -> None:
    """The file and the page, in the order of the manifest."""
    order = [model.name for model in models_of(args.drivers)]
    listed = sorted(rows.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**head, "rows": listed}, indent=1) + "\n")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(table.page(head, listed))


def collect(args: argparse.Namespace, head: Row, models: list[Model]) -> tuple[dict[str, Row], bool]:
    """All rows by name, and whether somebody interrupted."""
    keep = args.resume or args.models is not None
    rows: dict[str, Row] = {row["name"]: row for row in stored(args.json)["rows"]} if keep else {}
    with tempfile.TemporaryDirectory(prefix="deq-reach-") as cache:
        plan = conduct.Plan(args.sources, args.drivers, cache, args.limit)
        try:
            for model in models:
                if args.resume and model.name in rows and rows[model.name].get("commit_of_ours") == head["commit"]:
                    continue
                print(model.name, file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(prefix="deq-reach-") as scratch:
                    out = args.logs / model.name if args.logs else Path(scratch)
                    out.mkdir(parents=True, exist_ok=True)
                    row = conduct.measure(model, plan, out)
                rows[model.name] = row | {"commit_of_ours": head["commit"]}
                write(args, head, rows)
                print("   ", *table.line(row)[2:], sep="  ", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted: the page shows what is finished; --resume goes on", file=sys.stderr)
            return rows, True
    return rows, False


def main(args: argparse.Namespace) -> int:
    if args.child:
        return child.main(args.child)
    if args.table:
        whole = stored(args.json)
        args.page.write_text(table.page(whole, whole["rows"]))
        return 0
    if args.sources is None:
        raise SystemExit("--sources: expected a folder of clones, got none. Fix: --sources FOLDER, or --table for the page alone")
    args.sources = args.sources.resolve()
    models = runnable(chosen(args.drivers, args.models), args.sources)
    if args.list:
        print("\n".join(f"{model.name}: {model.repository} {model.commit}" for model in models))
        return 0
    args.threads, args.repeats = 1, conduct.TURNS
    head = header(args) | {"seconds": args.limit, "commit": product_commit()}
    rows, interrupted = collect(args, head, models)
    print(table.counts(list(rows.values())), f"\n{machine.one_line(head['machine'])}")
    return 130 if interrupted else int(any(table.wrong(row) or table.crashed(row) for row in rows.values()))
