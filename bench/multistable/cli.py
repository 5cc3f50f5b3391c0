"""``python -m bench multistable``: loops with several fixed points and with one: wrong batches, and who is followed needlessly.

A batch is wrong where a sample of the compiled loop is further than 1 % from the user's own loop in float64. Every body is also
run with its input in the body (at a thousandth), since one that an input reaches through the initial state alone is suspected
from the start.
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
from torch import Tensor

from bench import machine, problems
from deq_compile import Report, record_solves
from deq_compile.testing import Backend

from .bodies import BODIES, Multistable

OFF = 1e-2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=100, help="batches a body (default %(default)s)")
    parser.add_argument("--honest", type=int, default=500, help="fuzzed contractions with one fixed point (default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, body in BODIES.items():
        for injected in (False, True):
            rows.append(measure(name, body, injected, args.batches))
            print(rows[-1], flush=True)
            _write(args.out, rows, [])
    honest = [honest_problem(name) for name in problems.PROBLEMS] + [contraction(seed) for seed in range(args.honest)]
    _write(args.out, rows, honest)
    print(tabulate(rows, headers="keys"))
    followed = [row["name"] for row in honest if row["status"] == "follow"]
    print(f"\n{len(honest)} bodies with one fixed point, of which {len(followed)} are followed {followed[:8]}")
    return int(any(row["wrong batches"] for row in rows) or bool(followed))


def _write(path: Path | None, rows: list[dict[str, Any]], honest: list[dict[str, Any]]) -> None:
    if path is not None:
        facts = {"date": f"{datetime.date.today()}", "machine": machine.describe(), "rows": rows, "honest": honest}
        path.write_text(json.dumps(facts, indent=1) + "\n")


def _compiled(run: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], Report]:
    torch._dynamo.reset()
    report = Report()
    return torch.compile(run, backend=Backend({"inner": "eager"}, report)), report


def measure(name: str, body: Multistable, injected: bool, batches: int) -> dict[str, Any]:
    """One row: how many of so many batches hold a wrong sample, without gradients."""
    run = body.loop(injected)
    call, report = _compiled(run)
    wrong, evaluations = 0, []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for i in range(batches):
            x = body.start(i)
            right = run(x.double()).flatten(1)
            with record_solves() as solves:
                found = call(x).double().flatten(1)
            off = (found - right).norm(dim=1) / right.norm(dim=1)
            wrong += int(bool((off > OFF).any()))
            evaluations.append(sum(s.evaluations for s in solves))
    return {
        "body": name,
        "injected": injected,
        "status": report.regions[0].status if report.regions else "none",
        "wrong batches": wrong,
        "batches": batches,
        "evaluations a batch": sorted(evaluations)[len(evaluations) // 2],
        "the loop's": report.regions[0].iterations if report.regions else None,
    }


def honest_problem(name: str) -> dict[str, Any]:
    """A body of the benchmarks, whose fixed point is one: it contracts."""
    module, x, _ = problems.make(name)
    call, report = _compiled(module)
    with torch.no_grad():
        call(x)
    return {"name": name, "status": report.regions[0].status}


def contraction(seed: int) -> dict[str, Any]:
    """The first comparison of a random contraction: tanh or LayerNorm bodies of random size, slope, injection and start."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    B, D = 2 + seed % 7, 4 + seed % 29
    W = torch.randn(D, D, generator=generator)
    W = W * (pick(0.2, 0.97) / torch.linalg.matrix_norm(W, 2))
    x, u = torch.randn(B, D, generator=generator), pick(0.0, 2.0)
    z0 = torch.randn(B, D, generator=generator) * (seed % 3)
    act = (torch.tanh, torch.sin, torch.relu)[seed % 3]

    def loop(z0: Tensor, x: Tensor) -> Tensor:
        z = z0
        for _ in range(120):
            z = act(z @ W + u * x)
        return z

    call, report = _compiled(loop)  # type: ignore[arg-type]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(z0, x)  # type: ignore[call-arg]
    return {"name": f"contraction-{seed}", "status": report.regions[0].status if report.regions else "none"}
