"""``python -m bench language``: training steps of an equilibrium language model written as users write it, eager, Inductor and deq.

The model is that of tests/models/equilibrium_lm.py: Anderson's method to 3e-4 without gradients, and an autograd Function that attaches
the implicit gradient (solved by plain iteration, or by Anderson's method) or one step of its Neumann series. It is measured at its first
weights and after some training on this project's notes. Rows of one case are timed in turns in one process (two steps a turn, the second
counts), one thread, process CPU time, medians. Gradients are compared with float64. "deq, tighter" solves to half of the user's
tolerances: where deq's gradient is worse than the user's own, that row is the one at equal error.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from bench import machine
from bench.tables.cases import Case
from bench.tables.cli import header
from bench.tables.measure import Row, interleave, prepare
from bench.tables.methods import CompiledLoop, Deq, Step
from bench.tables.reference import relative_error
from tests.models.equilibrium_lm import converged

from .training import batches, fresh, trained

GRADIENTS = ("ift", "anderson", "onestep")
WAYS = ("eager", "inductor", "deq", "deq, tighter")
WARM_UP = 6  # deq compares calls 0, 1, 2 and 4
EQUAL = 1.05  # errors that differ by less are the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", default="192", help="comma-separated (default %(default)s)")
    parser.add_argument("--gates", default="-0.5,0.5", help="of the state, before the sigmoid (default %(default)s)")
    parser.add_argument("--steps", default="0,200", help="steps of training before (default %(default)s)")
    parser.add_argument("--gradients", default=",".join(GRADIENTS), help="of: %(default)s")
    parser.add_argument("--repeats", type=int, default=11, help="timed steps of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--show", type=Path, help="print the table of a JSON file instead of measuring")


def step_of(way: str, case: Case) -> Step:
    if way == "eager":
        return Step(case)
    if way == "inductor":
        return CompiledLoop(case)
    tighter = {"tol": case.model.tol / 2, "backward_tol": case.model.tol / 4}
    return Deq(case, **(tighter if way != "deq" else {}))


def measure(width: int, gate: float, trained_for: int, gradient: str, weights: dict[str, Tensor], repeats: int) -> Iterator[Row]:
    """The rows of one case."""
    model = fresh(width, gradient, gate)
    model.load_state_dict(weights)
    ((tokens, targets),) = batches(1)
    truth = converged(copy.deepcopy(model).double(), tokens, targets)
    steps, rows = dict[str, Step](), dict[str, Row]()
    for way in WAYS:
        torch._dynamo.utils.counters.clear()
        case = Case("language", "own", None, copy.deepcopy(model), (tokens, targets), cotangents=[torch.ones(())])
        step = step_of(way, case)
        for _ in range(WARM_UP):
            step.run()
        row: Row = {"width": width, "gate": gate, "trained": trained_for, "gradient": gradient, "method": way}
        row |= step.counts() | {"graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"])}
        row |= {"iterations": case.model.info["iters"], "told residual": case.model.info["rel_residual"]}
        row["loss_error"] = relative_error([step.outputs.detach()], truth[:1])
        row["gradient_error"] = relative_error(case.gradients(), truth[1:])
        steps[way], rows[way] = step, row
    yield from interleave(steps, rows, repeats, f"{gradient}, width {width}, gate {gate}, trained {trained_for}")


def ratios(rows: list[Row]) -> dict[str, float]:
    """How many times as fast as Inductor: deq at its defaults, and the fastest of ours whose gradient is no worse than the user's."""
    ms = {row["method"]: row["cpu"]["step_ms"] for row in rows}
    own = next(row["gradient_error"] for row in rows if row["method"] == "inductor")
    ours = [row for row in rows if row["method"].startswith("deq") and row["gradient_error"] <= EQUAL * own]
    fastest = min((row["cpu"]["step_ms"] for row in ours), default=float("nan"))
    return {"as it is": ms["inductor"] / ms["deq"], "at equal error": ms["inductor"] / fastest, "eager": ms["eager"] / ms["deq"]}


def table(rows: list[Row]) -> str:
    keys = ("width", "gate", "trained", "gradient")
    lines = []
    for case, group in itertools.groupby(rows, key=lambda row: [row[key] for key in keys]):
        found = list(group)
        for row in found:
            cpu = row["cpu"]
            lines.append(
                [*case, row["method"], *(f"{cpu[k]:.1f}" for k in ("step_ms", "forward_ms", "backward_ms")), row["iterations"],
                 row["vjps"] or "", f"{row['gradient_error']:.1e}", row["graphs"], row["status"]]
            )  # fmt: skip
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(found).items())
        lines.append([*case, f"Inductor over deq: {said}"])
    headers = [*keys, "", "step ms", "forward", "backward", "iterations", "products", "gradient error", "graphs", "status"]
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    if args.show:
        print(table(json.loads(args.show.read_text())["rows"]))
        return 0
    torch.set_num_threads(args.threads)
    prepare()
    head, rows = header(args), list[Row]()
    numbers = (map(int, args.widths.split(",")), map(float, args.gates.split(",")), map(int, args.steps.split(",")))
    for width, gate, steps in itertools.product(*numbers):
        weights = trained(width, steps, gate)
        for gradient in args.gradients.split(","):
            torch._dynamo.reset()
            rows += measure(width, gate, steps, gradient, weights, args.repeats)
            if args.json:
                args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            print(table(rows[-len(WAYS) :]), file=sys.stderr, flush=True)
    print(f"{table(rows)}\n\n{machine.one_line(head['machine'])}; {head['date'][:10]}, commit {head['commit'] or 'unknown'}")
    return 0
