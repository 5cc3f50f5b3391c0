"""``python -m bench language``: training steps of an equilibrium language model as users write it: eager, Inductor, deq.

The model is that of tests/models/equilibrium_lm.py: Anderson's method to 3e-4 without gradients, and an autograd Function that
attaches the implicit gradient (by plain iteration, or by Anderson's method) or one step of its Neumann series. It is measured at
its first weights and after some training on this project's notes. Rows of one case are timed in turns in one process (two steps
a turn, the second counts), one thread, process CPU time, medians. Gradients are compared with float64. "deq, equal error" has the
loosest tolerances, of a few multiples of the user's, at which its gradient is no worse than the user's own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from bench import machine
from bench.tables.cases import Case
from bench.tables.cli import header
from bench.tables.measure import Row, interleave, prepare
from bench.tables.methods import CompiledLoop, Deq, Step
from bench.tables.reference import relative_error
from tests.models.equilibrium_lm import EquilibriumLM, converged

from .training import batches, fresh, trained

GRADIENTS = ("ift", "anderson", "onestep")
WAYS = ("eager", "inductor", "deq", "deq, equal error")
LOOSENED = (2.0, 1.5, 1.0, 0.5, 0.25)
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


def begun(way: str, model: EquilibriumLM, batch: tuple[Tensor, Tensor], truth: list[Tensor]) -> tuple[Step, Row]:
    """A step after its first calls, and what it came to."""
    torch._dynamo.utils.counters.clear()
    own = copy.deepcopy(model)
    case = Case("language", "own", None, own, batch, cotangents=[torch.ones(())])
    kinds = {"eager": Step, "inductor": CompiledLoop}
    step = kinds[way](case) if way in kinds else Deq(case, **_tolerances(way, own.tol))
    for _ in range(WARM_UP):
        step.run()
    row: Row = {"method": way} | step.counts() | {"graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"])}
    row |= {"iterations": own.info["iters"], "told residual": own.info["rel_residual"]}
    row["loss_error"] = relative_error([step.outputs.detach()], truth[:1])
    row["gradient_error"] = relative_error(case.gradients(), truth[1:])
    return step, row


def _tolerances(way: str, tol: float) -> dict[str, float]:
    _, _, factor = way.partition(" x ")
    return {"tol": tol * float(factor), "backward_tol": tol * float(factor)} if factor else {}


def measure(model: EquilibriumLM, repeats: int, what: str) -> Iterator[Row]:
    """The rows of one case."""
    (batch,) = batches(1)
    truth = converged(copy.deepcopy(model).double(), *batch)
    found = {way: begun(way, model, batch, truth) for way in WAYS[:3]}
    limit = EQUAL * found["inductor"][1]["gradient_error"]
    for factor in LOOSENED:
        found[WAYS[3]] = begun(f"deq x {factor}", model, batch, truth)
        if found[WAYS[3]][1]["gradient_error"] <= limit:
            break
    steps, rows = {way: step for way, (step, _) in found.items()}, {way: row for way, (_, row) in found.items()}
    yield from interleave(steps, rows, repeats, what)


def ratios(rows: list[Row]) -> dict[str, float]:
    """How many times as fast as Inductor deq is: at its defaults, and where its gradient is no worse than the user's."""
    ms = {way: row["cpu"]["step_ms"] for way, row in zip(WAYS, rows, strict=True)}
    good = rows[3]["gradient_error"] <= EQUAL * rows[1]["gradient_error"]
    equal = ms["inductor"] / ms["deq, equal error"] if good else float("nan")
    return {"as it is": ms["inductor"] / ms["deq"], "at equal error": equal, "the eager model over deq": ms["eager"] / ms["deq"]}


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
            model = fresh(width, gradient, gate)
            model.load_state_dict(weights)
            facts = {"width": width, "gate": gate, "trained": steps, "gradient": gradient}
            rows += [facts | row for row in measure(model, args.repeats, str(facts))]
            if args.json:
                args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            print(table(rows[-len(WAYS) :]), file=sys.stderr, flush=True)
    print(f"{table(rows)}\n\n{machine.one_line(head['machine'])}; {head['date'][:10]}, commit {head['commit'] or 'unknown'}")
    return 0
