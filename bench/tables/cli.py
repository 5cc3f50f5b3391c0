"""``python -m bench tables``: every way to run one training step of a fixed-point model, beside the others.

Rows of one problem are timed in turns in one process, so ratios are of the same moments; a turn is two steps of a row, of
which the second is timed. With one thread the clock of record is the process's CPU time, with more it is wall time, and both
are in the JSON. Beside one thread each problem is timed again in a process with all threads (wall time). Memory and the first
step (cold Inductor cache) come from a process for each row. Finished rows lie in build/tables and survive an interruption;
``--resume`` takes them up again. Gradients (all parameters and x) are compared with float64.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import machine

from . import outputs, report
from .cases import known
from .methods import all_methods
from .runs import ROOT, child, pending, read_rows, run_task, tasks

QUICK_PROBLEMS = ("mlp128", "conv")
QUICK_METHODS = ("eager", "torchdeq-broyden", "torchdeq-fixed", "deq", "bound")
PACKAGES = ("torch", "deq_compile", "torchdeq", "jax", "jaxopt", "optimistix", "silva-networks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two problems, few rows and repeats, no memory")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--problems", help="comma-separated; default: all")
    parser.add_argument("--methods", help=f"comma-separated, of: {', '.join(all_methods())}; default: all")
    parser.add_argument("--forms", help="comma-separated: before, inside, own; default: all that a problem has")
    parser.add_argument("--repeats", type=int, help="timed steps of each row (default 15; quick 5)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--no-all-threads", action="store_true", help="leave out the wall time on all threads beside --threads 1")
    parser.add_argument("--resume", action="store_true", help="keep rows of an interrupted run with the same settings")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", action="store_true", help="print compact Markdown tables, and nothing else")
    parser.add_argument("--compare", type=Path, help="JSON of an older run: ratios of medians, old over new")
    parser.add_argument("--plot", type=Path, help="speed-up bars")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file instead of measuring")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "tables", help="folder of unfinished runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a task as JSON: the child's own call


def commit() -> str:
    """The git commit, with a plus where tracked files differ from it; empty outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def header(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": {name: machine.version(name) for name in PACKAGES},
        "commit": commit(),
        "clock": clock_of(args.threads),
        "settings": {"threads": args.threads, "repeats": args.repeats},
    }


def clock_of(threads: int) -> str:
    return "cpu" if threads == 1 else "wall"


def run_key(head: dict[str, Any]) -> str:
    """What has to be equal for rows of an earlier run to be taken over."""
    same = {name: head[name] for name in ("versions", "commit", "settings")}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]


def collect(args: argparse.Namespace, head: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """All rows, and whether somebody interrupted."""
    quick_problems, quick_methods = list(QUICK_PROBLEMS), list(QUICK_METHODS)
    problems = args.problems.split(",") if args.problems else quick_problems if args.quick else known()
    methods = args.methods.split(",") if args.methods else quick_methods if args.quick else list(all_methods())
    for what, names, allowed in (("--problems", problems, known()), ("--methods", methods, list(all_methods()))):
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise SystemExit(f"{what}: expected some of {', '.join(allowed)}; got {', '.join(unknown)}")
    if "bound" in methods and "deq" not in methods:
        methods.append("deq")  # the bound does what this row did
    methods.sort(key=list(all_methods()).index)
    forms = args.forms.split(",") if args.forms else ["before", "own"] if args.quick else None
    args.out.mkdir(parents=True, exist_ok=True)
    file, run = args.out / "rows.jsonl", run_key(head)
    if not args.resume:
        file.unlink(missing_ok=True)
    interrupted = False
    try:
        with_threads = args.threads == 1 < machine.usable_cores() and not (args.quick or args.no_all_threads)
        for task in tasks(problems, methods, forms, not (args.quick or args.no_memory), with_threads):
            left = pending(task, read_rows(file, run))
            if left is not None:
                what = f"{task['method']}" if task["kind"] == "memory" else "all rows in turns"
                print(f"{task['kind']}: {task['problem']}, {what}", file=sys.stderr, flush=True)
                run_task(args, left | {"file": str(file), "run": run})
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the tables show what is finished; --resume goes on", file=sys.stderr)
    return read_rows(file, run), interrupted


def present(args: argparse.Namespace, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    methods = all_methods()
    labels = {key: method.label for key, method in methods.items()}
    kinds, clock = {key: method.kind for key, method in methods.items()}, head["clock"]
    derived = report.derive(rows, kinds, clock)
    line = f"{machine.one_line(head['machine'])}; {head['date'][:10]}, commit {head['commit'] or 'unknown'}"
    what = "process CPU time" if clock == "cpu" else "wall time"
    if args.markdown:
        print(f"{outputs.markdown(derived, labels, clock)}\n\nForward + backward, {what}, medians. {line}")
    else:
        print(f"{line}\nforward + backward, {what}, medians of steps taken in turns\n")
        print(f"{report.text_tables(derived, labels, clock)}\n\n{outputs.targets(derived, clock)}")
    if args.compare:
        old = json.loads(args.compare.read_text())
        if any(old["machine"].get(name) != head["machine"].get(name) for name in ("cpu", "cores", "threads", "torch")):
            print(f"\nthe older run is of another machine: {machine.one_line(old['machine'])}; {old['date'][:10]}")
        print(f"\n{outputs.compare(rows, old['rows'], labels, clock)}")
    if args.plot:
        outputs.plot(derived, labels, clock, args.plot)


def main(args: argparse.Namespace) -> int:
    args.repeats = args.repeats or (5 if args.quick else 15)
    if args.child:
        return child(args)
    if args.show:
        stored = json.loads(args.show.read_text())
        present(args, stored, stored["rows"])
        return 0
    args.out = args.out.resolve()
    torch.set_num_threads(args.threads)
    head = header(args)
    rows, interrupted = collect(args, head)
    present(args, head, rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 130 if interrupted else 1 if any("error" in row for row in rows) else 0
