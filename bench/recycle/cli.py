"""``python -m bench recycle``: what factors of earlier batches save, and a solver that chooses itself: counts, whole steps.

"training": the nine bodies of the gradient study are trained with recycle="auto"; in every step the same problem, with the same
weights, batch and loss, is also solved by a region that recycles nothing. "steps": CPU time of whole training steps with and
without, in turns, on problems of the tables, trained. "solver": the same of solver="auto" and Broyden. "study": what rank, ridge,
rows and period of what is recycled are worth, and bfloat16; six of the bodies where none are named. "ways": what else an adjoint
may be preconditioned with. One thread. Finished rows are in --json after each, and those of an interrupted run with the same
settings are kept by --resume.
"""

from __future__ import annotations

import argparse
import datetime
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench import machine
from bench.gradients.bodies import RECIPES
from bench.tables.cli import commit

from . import plot, steps, study, training, ways

PARTS = ("training", "steps", "solver", "study", "ways")
OPTIONS = {"steps": ("recycle", "never"), "solver": ("solver", "broyden")}  # the option of a part, and its value before
TOLERANCES = (1e-4, 1e-2)
PROBLEMS = ("mlp128", "mlp1024", "mlp1024-orthogonal", "conv", "transformer")
QUICK_STEPS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", default=",".join(PARTS[:3]), help=f"comma-separated, of: {','.join(PARTS)}; default: %(default)s"
    )
    parser.add_argument("--bodies", default=",".join(RECIPES), help="comma-separated, of: %(default)s")
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="of the tables, for the steps (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each body (default %(default)s)")
    parser.add_argument("--recycle", default="auto", choices=("auto", "always"), help="what is compared with never")
    parser.add_argument("--trained", type=int, default=100, help="steps before the timed ones (default %(default)s)")
    parser.add_argument("--timed", type=int, default=100, help="timed steps (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps a training, 10 timed ones")
    parser.add_argument("--json", type=Path, help="write everything there, after each row")
    parser.add_argument("--plot", type=Path, help="draw the shares that are left of evaluations and products")
    parser.add_argument("--resume", action="store_true", help="keep the rows that stand in --json")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    done: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    if args.resume and args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        done = {part: before.get(part, []) for part in PARTS}
    for part, key, work in tasks(args):
        if any(all(row[name] == value for name, value in key.items()) for row in done[part]):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bodies in training miss their tolerance now and then
            done[part].append({**work(), "commit": commit()})
        print(done[part][-1], flush=True)
        if args.json:
            head = {
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "machine": machine.describe(), "torch": machine.version("torch"),
            }  # fmt: skip
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**head, **done}, indent=1) + "\n")
    present(done)
    if args.plot and done["training"]:
        plot.draw(done["training"], args.plot)
    return 0


Task = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]


def tasks(args: argparse.Namespace) -> list[Task]:
    """Part, what a row of it is known by, and how it is made; seeds outermost, so that an interrupted run has all bodies."""
    found: list[Task] = []
    wanted, count = args.parts.split(","), QUICK_STEPS if args.quick else None
    for seed in range(args.seeds if "training" in wanted else 0):
        for tol in TOLERANCES:
            for body in args.bodies.split(","):
                key = {"body": body, "seed": seed, "tol": tol, "recycle": args.recycle}
                found.append(("training", key, lambda key=key: training.row(**key, steps=count)))  # type: ignore[misc]
    trained, timed = (20, 10) if args.quick else (args.trained, args.timed)
    for part, (option, before) in OPTIONS.items():
        for name in args.problems.split(",") if part in wanted else ():
            values = {"option": option, "before": before, "after": args.recycle}
            key = {"problem": name, "trained": trained, "timed": timed, **values}
            found.append((part, key, lambda key=key: steps.measure(**key)))  # type: ignore[misc]
    for seed in range(args.seeds if "ways" in wanted else 0):
        for body in args.bodies.split(","):
            key = {"body": body, "seed": seed}
            found.append(("ways", key, lambda key=key: ways.row(**key, steps=count)))  # type: ignore[misc]
    for name, value in study.changes() if "study" in wanted else ():
        for body in study.BODIES if args.bodies == ",".join(RECIPES) else args.bodies.split(","):
            key = {"body": body, "changed_to": f"{name}={value}" if name else ""}
            found.append(("study", key, lambda key=key: study.row(**key, steps=count)))  # type: ignore[misc]
    return found


def present(done: dict[str, list[dict[str, Any]]]) -> None:
    """Means over seeds, and the steps."""
    rows = []
    for tol, body in sorted({(row["tol"], row["body"]) for row in done["training"]}):
        mine = [row for row in done["training"] if (row["tol"], row["body"]) == (tol, body)]
        rows.append({"tol": tol, "body": body, "seeds": len(mine), **_row(mine, "evaluations"), **_row(mine, "products")})
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    print(tabulate(study.table(done["study"]), headers="keys"))
    print(tabulate(ways.table(done["ways"]), headers="keys"))
    for part in OPTIONS:
        print(tabulate(done[part], headers="keys", floatfmt=".3g"))


def _row(rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        known = [row[name] for row in rows if row[name] is not None]
        return sum(known) / len(known) if known else None

    mine, theirs, on, off = (mean(name) for name in (what, f"{what} without", f"{what} where on", f"{what} where on, without"))
    assert mine is not None
    assert theirs is not None
    return {
        f"{what} without": theirs, what: mine, f"{what} change": f"{mine / theirs - 1:+.1%}",
        "share on": mean(f"{what} share on"), "change where on": f"{on / off - 1:+.1%}" if on and off else "",
    }  # fmt: skip
