"""``python -m bench compile-time``: what the first training step costs as the loop gets longer, and memory as well.

Each row is a process of its own with an empty Inductor cache. The first forward and backward is split into Dynamo's trace,
our passes, the inner compiler on the graph around the regions (on the whole unrolled loop for Inductor), and the bodies.
What stands before it, and a second process, are in ``python -m bench start``. Wall time is what a user waits for; CPU
seconds, compiler processes included, do not depend on what else runs. Peak memory is that of a later step above what lies
in memory between steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate

from bench import machine

from . import memory
from .cases import Case, load
from .cli import header
from .methods import CompiledLoop, Deq, Step
from .report import number
from .runs import ROOT

Row = dict[str, Any]

ROWS: dict[str, tuple[str, Callable[[Case], Step]]] = {
    "eager": ("eager loop", Step),
    "inductor": ("torch.compile of the loop", CompiledLoop),
    "deq": ("deq", Deq),
    # A fixed point to a tolerance of 1e-4 is never this close to the loop's result: the region is kept.
    "deq-kept": ("deq, loop kept", lambda case: Deq(case, verify_tol=1e-12)),
    "deq-kept-lean": ("deq, loop kept, loop_memory=10", lambda case: Deq(case, verify_tol=1e-12, loop_memory=10)),
}
PARTS = {"dynamo_s": "Dynamo", "passes_s": "passes", "graph_s": "graph", "bodies_s": "bodies", "rest_s": "rest"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="10 iterations only, compiled rows only")
    parser.add_argument("--problem", default="transformer", help="default: %(default)s")
    parser.add_argument("--lengths", default="10,30,100", help="iterations of the loop (default %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, of: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a row may take (default %(default)g)")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--child", help=argparse.SUPPRESS)


# ---- the child: one row


class Stopwatch:
    """Time spent in functions of ours, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Time all calls; nothing where the attribute does not exist."""
        original = getattr(owner, attribute, None)
        if original is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

        setattr(owner, attribute, timed)


def cpu_seconds() -> float:
    """CPU time of this process and of all it has started, compilers included."""
    total = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def split(total: float, metrics: dict[str, list[float]], watch: Stopwatch) -> Row:
    """Where the first step's wall time went. Nested parts are told apart by subtraction."""

    def spent(name: str) -> float:
        return sum(metrics.get(name, []))

    backend, passes = spent("OutputGraph.call_user_compiler"), watch.seconds.get("passes", 0.0)
    parts = {
        "dynamo_s": spent("_compile.compile_inner") - backend,
        "passes_s": passes,
        "graph_s": backend - passes + spent("backward._backward_impl"),
        "bodies_s": watch.seconds.get("bodies", 0.0),
    }
    return parts | {"rest_s": total - sum(parts.values())}


def child(task: Row) -> Row:
    import torch._dynamo.utils as dynamo

    from deq_compile.testing import Program, rewrite

    torch.set_num_threads(task["threads"])
    watch = Stopwatch()
    watch.wrap(rewrite, "rewrite", "passes")
    for name in ("_compile_plain", "_compile_joint"):
        watch.wrap(Program, name, "bodies")
    case = load(task["problem"], "inside", task["iterations"])
    step = ROWS[task["row"]][1](case)
    first: Row = {}
    before = cpu_seconds()

    def run() -> None:
        begun = time.perf_counter()
        step.run()
        if not first:
            total = time.perf_counter() - begun
            first.update(split(total, dict(dynamo.compilation_time_metrics), watch), cpu_s=cpu_seconds() - before)

    return memory.measure(run) | first | {"status": step.counts().get("status")}


# ---- the parent


def run_row(args: argparse.Namespace, row: str, iterations: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="deq-compile-time-") as folder:
        what: Row = {"problem": args.problem, "row": row, "iterations": iterations}
        return run_child(what, args, {**os.environ, **memory.ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": folder})


def run_child(what: Row, args: argparse.Namespace, environment: dict[str, str]) -> Row:
    command = [sys.executable, "-m", "bench", "compile-time", "--child", json.dumps(what | {"threads": args.threads})]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=args.timeout
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return what | {"error": str(error).splitlines()[0], "wall_s": time.perf_counter() - begun}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return what | found


def format_table(rows: list[Row]) -> str:
    headers = ["iterations", "", "first step (s)", "of Inductor's", *PARTS.values(), "CPU (s)", "of Inductor's CPU"]
    headers += ["step memory (MB)"]
    headers += ["of eager's", "status"]
    lines = []
    for row in rows:
        label = ROWS[row["row"]][0]
        if "error" in row:
            lines.append([row["iterations"], label, f"failed: {row['error'][:60]}", *[""] * (len(headers) - 3)])
            continue
        same = {r["row"]: r for r in rows if r["iterations"] == row["iterations"] and "error" not in r}
        lines.append(
            [
                row["iterations"],
                label,
                f"{row['first_s']:.2f}",
                number(quotient(row, same.get("inductor"), "first_s"), ".2f"),
                *(number(row.get(part), ".2f") for part in PARTS),
                f"{row['cpu_s']:.1f}",
                number(quotient(row, same.get("inductor"), "cpu_s"), ".2f"),
                number(row.get("memory_mb"), ".1f"),
                number(quotient(row, same.get("eager"), "memory_mb"), ".2f"),
                row["status"],
            ]
        )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def quotient(row: Row, other: Row | None, name: str) -> float | None:
    if other is None or not other.get(name) or row.get(name) is None:
        return None
    return float(row[name] / other[name])


def main(args: argparse.Namespace) -> int:
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return 0
    lengths = [10] if args.quick else [int(n) for n in args.lengths.split(",")]
    names = ["inductor", "deq"] if args.quick else args.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise SystemExit(f"--rows: expected some of {', '.join(ROWS)}; got {', '.join(unknown)}")
    torch.set_num_threads(args.threads)
    args.repeats = 1
    head, rows = header(args), list[Row]()
    try:
        for iterations in lengths:
            for name in names:
                print(f"{iterations} iterations: {ROWS[name][0]}", file=sys.stderr, flush=True)
                rows.append(run_row(args, name, iterations))
    except KeyboardInterrupt:
        print("interrupted: the table shows what is finished", file=sys.stderr)
    print(f"\n{format_table(rows)}\n\n{args.problem}, x inside the loop; {machine.one_line(head['machine'])}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**head, "problem": args.problem, "rows": rows}, indent=1) + "\n")
    return 1 if any("error" in row for row in rows) else 0
