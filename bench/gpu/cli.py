"""``python -m bench gpu``: everything that only a device can tell, in two calls of ten minutes (`--call 1`, `--call 2`).

Call 1 runs one compiled model through all engines, then the probes of what was assumed about the device, then the correctness of
kernels and models, then the first experiments. Call 2 times every kernel at real shapes, and whole training steps beside their
peers. Kernels and models are compiled ahead in parallel processes. Each group of a part is a process of its own with a time
limit; all rows go to OUT/gpu-results.json as they come, and a call adds to what the file holds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--call", type=int, choices=(0, 1, 2), default=0, help="1, 2, or 0 for all in one (default %(default)s)")
    parser.add_argument("--parts", default="", help="parts or groups with seconds, such as first=60,probe=90,steps.lm=120")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for the results (default %(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="no device: tiny shapes, Triton interpreted, stand-ins for CUDA, one process"
    )
    parser.add_argument("--tune", action="store_true", help="only sweep the tiles, and save those that are faster (4 minutes)")
    parser.add_argument(
        "--goals", nargs="*", type=Path, metavar="FILE", help="run nothing: the goals, from results (several merge)"
    )
    parser.add_argument("--readme", nargs="*", type=Path, metavar="FILE", help="run nothing: the README's table, from results")
    for hidden in ("--child", "--share"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, default=0, help=argparse.SUPPRESS)


def results_file(out: Path, dry: bool) -> Path:
    return out / ("gpu-dry-run.json" if dry else "gpu-results.json")


def environment(dry: bool) -> dict[str, str]:
    """What the processes of a run find in their environment, in time: torch and XLA read it when they are imported."""
    found = dict(os.environ)
    if dry:
        found["TRITON_INTERPRET"] = "1"
    else:
        found.pop("TRITON_INTERPRET", None)  # a device is there: nothing is interpreted
    found.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2" if dry else str(min(8, os.cpu_count() or 1)))
    found.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes three quarters of the memory
    return found


def main(args: argparse.Namespace) -> int:
    from . import children, conduct, plan

    if args.child:
        return children.run(args)
    for wanted, show in ((args.goals, conduct.show_goals), (args.readme, conduct.show_readme)):
        if wanted is not None:
            return show(wanted or [results_file(args.out, args.dry_run)])
    groups = plan.chosen("facts,tuning" if args.tune else args.parts, args.call)
    if args.dry_run and not (args.parts or args.call or args.tune):
        groups = plan.rehearsed()
    if groups[0].part != "facts":  # or nobody knows whose rows they are
        groups = [*plan.chosen("facts", 0), *(g for g in groups if g.part != "facts")]
    if not args.dry_run and not device_seen():
        raise SystemExit("bench gpu: expected a CUDA device, found none. Fix: run it where there is one, or add --dry-run")
    return conduct.run(args, groups)


def device_seen() -> bool:
    """Whether torch sees a CUDA device; asked in a process of its own, so that this one holds no context."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"]
    return subprocess.run(command, check=False, env=environment(dry=False)).returncode == 0
