"""``python -m bench roofline``: bytes that the CPU kernels move, and how long that takes against what the machine can do.

First the machine: GB/s of reading, copying and updating in place by the size of the set (C++ loops over eight streams, vectors
as wide as the kernels'), and Gflop/s of multiply-adds in registers. Then the Broyden step, the adjoint's move, and making and
applying M, over B, D and n: the bytes and flops of bench/roofline/counts.py, a call's time hot and cold, and its floor: those
bytes at the bandwidths of their sets, or those flops, whichever takes longer, from rates taken in turns with the calls. fp32,
one thread, process CPU time, medians.

The floor of a call that does less than a call costs says nothing; such rows are told apart ("call").
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.tables.cli import header

from . import ceilings, measure, outputs
from .subjects import KERNELS, shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few small shapes (seconds)")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="comma-separated, of: %(default)s")
    parser.add_argument("--repeats", type=int, help="rounds of rates, hot and cold calls (default 5; quick 3)")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file instead of measuring")
    parser.add_argument("--plot", type=Path, help="GB/s against the size of the set")
    parser.add_argument("--markdown", action="store_true", help="tables in GitHub's format")
    parser.add_argument("--brief", action="store_true", help="one line a shape, at 15 steps, as in NOTES.md")


def write(path: Path | None, stored: dict[str, Any]) -> None:
    """One line a row: a file of a hundred rows and more stays readable."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({name: value for name, value in stored.items() if name != "rows"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(short(row))}" for row in stored["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def short(row: dict[str, Any]) -> Any:
    """With six digits of each number."""
    return json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))


def collect(args: argparse.Namespace, stored: dict[str, Any], loops: ceilings.Loops, kernels: list[str]) -> bool:
    """Adds the rows to `stored`, and the file is written after each; whether somebody interrupted."""
    load = machine.OtherLoad()
    try:
        for row in measure.rows(shapes(args.quick), loops, stored["caches"], args.repeats, kernels):
            stored["rows"].append(row)
            stored["other_cores"] = load.mean_cores()
            write(args.out, stored)
            print(f"{row['kernel']} {row['B']} x {row['D']}, n = {row['n']}: {row['hot_us']:.1f} us", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: the tables show what is finished", file=sys.stderr)
        return True
    return False


def present(args: argparse.Namespace, stored: dict[str, Any]) -> None:
    print(f"{machine.one_line(stored['machine'])}; {stored['date'][:10]}, commit {stored['commit'] or 'unknown'}")
    print(f"fp32, process CPU time, medians; other programs kept {stored['other_cores']:.1f} cores busy\n")
    print(outputs.text(stored, args.brief, args.markdown))
    if args.plot:
        outputs.plot(stored, args.plot)


def main(args: argparse.Namespace) -> int:
    if args.show:
        present(args, json.loads(args.show.read_text()))
        return 0
    kernels = args.kernels.split(",")
    if unknown := [name for name in kernels if name not in KERNELS]:
        raise SystemExit(f"--kernels: expected some of {', '.join(KERNELS)}; got {', '.join(unknown)}")
    args.repeats = args.repeats or (3 if args.quick else 5)
    args.threads = 1
    torch.set_num_threads(args.threads)
    loops = ceilings.Loops.load(1 << 26 if args.quick else ceilings.LARGEST)
    gc.disable()
    try:
        stored = header(args) | {
            "caches": ceilings.cache_sizes(),
            "curve": ceilings.curve(loops, args.repeats),
            "gflops": statistics.median(loops.gflops() for _ in range(9)),
            "other_cores": 0.0,
            "rows": [],
        }
        interrupted = collect(args, stored, loops, kernels)
    finally:
        gc.enable()
    write(args.out, stored)
    present(args, stored)
    return 130 if interrupted else 0
