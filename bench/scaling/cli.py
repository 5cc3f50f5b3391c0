"""``python -m bench scaling``: time and peak memory of a training step as D, B and the loop's length grow.

One model, tanh(W z + U x) with |W|₂ = 0.95: the user's loop as it is, TorchDEQ's Broyden and fixed-point iteration with their
implicit gradients where it is installed, and deq at its defaults. Rows of one point are timed in turns in one process, on the
clock of `bench tables`; peak memory above what lies there between steps comes from a process for each row. Errors are against
float64 and decide what counts as converged. Finished points lie in build/scaling, and in --json as it goes; --resume takes
them up again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.tables import runs
from bench.tables.cli import clock_of, header, run_key
from bench.tables.methods import all_methods

from . import outputs
from .points import AXES, Point, Sweeps, sweeps

METHODS = ("eager", "torchdeq-broyden", "torchdeq-fixed", "deq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two small points a sweep (a few minutes)")
    parser.add_argument("--parts", default=",".join(AXES), help="comma-separated, of: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated rows of the tables (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, help="timed steps of each row (default 9; quick 3)")
    parser.add_argument("--resume", action="store_true", help="keep points of an interrupted run with the same settings")
    parser.add_argument("--json", type=Path, help="write everything there, after every point")
    parser.add_argument("--plot", type=Path, help="time against D, B and N, memory against N")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file instead of measuring")
    parser.add_argument("--out", type=Path, default=runs.ROOT / "build" / "scaling", help="folder of unfinished runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a task as JSON: the child's own call


def tasks(plan: Sweeps, methods: list[str]) -> list[dict[str, Any]]:
    """One timing task a point, however many sweeps it is in; then one memory task a row."""
    timing = {point.name: point for sweep, points in plan.items() if sweep != "memory" for point in points}
    found: list[dict[str, Any]] = [{"kind": "timing", "problem": name, "plan": {"before": methods}} for name in timing]
    for point in plan.get("memory", []):
        found += [{"kind": "memory", "problem": point.name, "inject": "before", "method": method} for method in methods]
    return found


def collect(args: argparse.Namespace, head: dict[str, Any], plan: Sweeps, methods: list[str]) -> tuple[list[outputs.Row], bool]:
    """All rows, and whether somebody interrupted; --json is written after every point."""
    args.out.mkdir(parents=True, exist_ok=True)
    file, run = args.out / "rows.jsonl", run_key(head)
    if not args.resume:
        file.unlink(missing_ok=True)
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="deq-scaling-") as cache:  # first steps are not measured: tasks share their code
        try:
            for task in tasks(plan, methods):
                left = runs.pending(task, runs.read_rows(file, run))
                if left is None:
                    continue
                print(f"{task['kind']}: {task['problem']} {task.get('method', '')}", file=sys.stderr, flush=True)
                runs.run_task(args, left | {"file": str(file), "run": run}, "scaling", cache)
                write(args, head, runs.read_rows(file, run))
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: the tables show what is finished; --resume goes on", file=sys.stderr)
    rows = runs.read_rows(file, run)
    write(args, head, rows)
    return rows, interrupted


def write(args: argparse.Namespace, head: dict[str, Any], rows: list[outputs.Row]) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def present(args: argparse.Namespace, head: dict[str, Any], rows: list[outputs.Row]) -> None:
    plan = {sweep: [Point.parse(name) for name in names] for sweep, names in head["sweeps"].items()}
    labels = {key: method.label for key, method in all_methods().items()}
    what = "process CPU time" if head["clock"] == "cpu" else "wall time"
    print(f"{machine.one_line(head['machine'])}; {head['date'][:10]}, commit {head['commit'] or 'unknown'}")
    print(f"forward + backward, {what}, medians of steps taken in turns\n")
    print(outputs.text_tables(rows, plan, labels, head["clock"]))
    if args.plot:
        outputs.plot(rows, plan, labels, head["clock"], args.plot)


def main(args: argparse.Namespace) -> int:
    args.repeats = args.repeats or (3 if args.quick else 9)
    if args.child:
        Point.parse(json.loads(args.child)["problem"]).register()
        return runs.child(args)
    if args.show:
        stored = json.loads(args.show.read_text())
        present(args, stored, stored["rows"])
        return 0
    methods, parts = args.methods.split(","), args.parts.split(",")
    for what, names, allowed in (("--parts", parts, list(AXES)), ("--methods", methods, list(all_methods()))):
        if unknown := [name for name in names if name not in allowed]:
            raise SystemExit(f"{what}: expected some of {', '.join(allowed)}; got {', '.join(unknown)}")
    plan = {sweep: points for sweep, points in sweeps(args.quick).items() if sweep in parts}
    args.out = args.out.resolve()
    torch.set_num_threads(args.threads)
    head = header(args) | {"clock": clock_of(args.threads)}
    head["sweeps"] = {sweep: [point.name for point in points] for sweep, points in plan.items()}
    rows, interrupted = collect(args, head, plan, methods)
    present(args, head, rows)
    return 130 if interrupted else 1 if any("error" in row for row in rows) else 0
