"""``python -m bench start``: what a process waits for until its first training step is done, with empty and with full caches.

A loop of the benchmark problems, forward and backward, in processes of their own. The clock starts when torch is imported and the
model is made: the import of the package, the call of ``torch.compile`` with what it imports, and the first step are what a script
waits for. "cold": Inductor's cache is an empty folder; "warm": the next process, which finds there what the first one left. Rows
in turns, medians of --repeats. CPU seconds include those of the compilers that were started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from . import problems
from .machine import one_line
from .tables.cli import header
from .tables.runs import ROOT

Row = dict[str, Any]
ROWS = {"inductor": "torch.compile of the loop", "deq": "deq"}
CACHES = ("cold", "warm")
PARTS = {"import_s": "import", "compile_s": "torch.compile", "step_s": "first step"}
TOLERANCE = 1e-2  # of the norm of the gradients: the default's

PROGRAM = """
import json, os, sys, time
import torch
asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])
from bench import problems
model, x, cotangent = problems.make(asked["problem"], asked["iterations"], "inside")
clock = lambda: (time.perf_counter(), sum(os.times()[:4]))
marks = [clock()]
if asked["row"] == "deq":
    import deq_compile
marks.append(clock())
compiled = torch.compile(model, backend="deq" if asked["row"] == "deq" else "inductor")
marks.append(clock())
problems.loss(compiled(x), cotangent).backward()
marks.append(clock())
import_s, compile_s, step_s = (b[0] - a[0] for a, b in zip(marks, marks[1:]))
norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
print(json.dumps({"import_s": import_s, "compile_s": compile_s, "step_s": step_s, "total_s": import_s + compile_s + step_s,
                  "cpu_s": marks[-1][1] - marks[0][1], "gradient": norm}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problem", default="transformer", choices=problems.PROBLEMS, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=30, help="of the loop (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds a process may take (default %(default)g)")
    parser.add_argument("--json", type=Path, help="write everything there, after each row")


def start(row: str, cache: str, folder: str, args: argparse.Namespace) -> Row:
    """One process."""
    asked = {"row": row, "problem": args.problem, "iterations": args.iterations, "threads": args.threads}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DEQ_COMPILE_")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=args.timeout)
    if done.returncode:
        raise SystemExit(f"{row}, {cache}: the process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {"row": row, "cache": cache, **json.loads(done.stdout.splitlines()[-1])}


def check(rows: list[Row]) -> None:
    """
    Raises:
        SystemExit: the rows have not come to the same gradients.
    """
    norms = [row["gradient"] for row in rows]
    if max(norms) - min(norms) > TOLERANCE * max(norms):
        raise SystemExit(f"expected gradients of one norm, to {TOLERANCE:g}, got {min(norms):.6g} to {max(norms):.6g}")


def medians(rows: list[Row]) -> dict[tuple[str, str], Row]:
    found = {}
    for key in ((row, cache) for cache in CACHES for row in ROWS):
        alike = [r for r in rows if (r["row"], r["cache"]) == key]
        if alike:
            found[key] = {name: statistics.median(r[name] for r in alike) for name in (*PARTS, "total_s", "cpu_s")}
    return found


def table(rows: list[Row]) -> str:
    found, lines = medians(rows), []
    for (row, cache), middle in found.items():
        other = found.get(("inductor", cache), middle)
        shares = [f"{middle[name] / other[name]:.2f}" for name in ("total_s", "cpu_s")]
        seconds = [f"{middle[name]:.2f}" for name in (*PARTS, "total_s")]
        lines.append([cache, ROWS[row], *seconds, shares[0], f"{middle['cpu_s']:.1f}", shares[1]])
    headers = ["cache", "", *(f"{name} (s)" for name in PARTS.values()), "all (s)", "of Inductor's", "CPU (s)", "of Inductor's"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    head, rows = header(args), list[Row]()
    try:
        for _ in range(args.repeats):
            for row in ROWS:
                with tempfile.TemporaryDirectory(prefix="deq-start-") as folder:
                    for cache in CACHES:
                        rows.append(start(row, cache, folder, args))
                        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                        if args.json:
                            args.json.parent.mkdir(parents=True, exist_ok=True)
                            args.json.write_text(json.dumps({**head, "problem": args.problem, "rows": rows}, indent=1) + "\n")
    except KeyboardInterrupt:
        print("interrupted: the table shows what is finished", file=sys.stderr)
    print(f"\n{table(rows)}\n\n{args.problem}, loop of {args.iterations}, x inside; {one_line(head['machine'])}")
    check(rows)
    return 0
