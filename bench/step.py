"""``python -m bench step``: one training step, the user's eager loop against the same model under ``backend="deq"``.

Both are timed in turns, forward and backward together, so that a slow moment of the machine falls on both. With one
thread the clock is the process's CPU time, which does not see other processes; with more it is wall time. Gradients
(of all parameters and of x) are compared with float64 backpropagation through 200 iterations of the user's loop.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench import machine, problems

REFERENCE_ITERATIONS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", default="mlp1024,transformer", help=f"of: {','.join(problems.PROBLEMS)}; or all")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each (default %(default)s)")
    parser.add_argument("--loop", type=int, default=30, help="iterations of the user's loop (default %(default)s)")
    parser.add_argument("--inject", choices=["inside", "before"], default="inside", help="where x enters")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the deq backend, as JSON")
    parser.add_argument("--json", type=Path, help="write machine, settings and figures there")


def gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = [tensor.grad for tensor in (*model.parameters(), x)]
    assert all(gradient is not None for gradient in found), "a parameter or x got no gradient"
    return [gradient.double() for gradient in found if gradient is not None]


def relative_error(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """|g − g_ref| / |g_ref| over all gradients as one vector."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return (difference / sum(float(b.square().sum()) for b in reference)) ** 0.5


def reference_gradients(name: str) -> list[torch.Tensor]:
    # x enters before the loop here: the same function, and half the memory.
    module, x, c = problems.make(name, REFERENCE_ITERATIONS, "before")
    module, x, c = module.double(), x.detach().double().requires_grad_(), c.double()
    problems.loss(module(x), c).backward()
    return gradients(module, x)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time and check one problem."""
    torch._dynamo.reset()
    from deq_compile import record_solves

    module, x, c = problems.make(name, args.loop, args.inject)
    user = copy.deepcopy(module)
    models: dict[str, tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = {
        "eager": (user, user),
        "deq": (module, torch.compile(module, backend="deq", options=args.options)),
    }
    clock = time.process_time if args.threads == 1 else time.perf_counter

    def step(which: str) -> float:
        owner, call = models[which]
        owner.zero_grad(set_to_none=True)
        x.grad = None
        start = clock()
        problems.loss(call(x), c).backward()
        return clock() - start

    begun = time.perf_counter()
    step("deq")
    first = time.perf_counter() - begun
    reference = reference_gradients(name)
    errors: dict[str, float] = {}
    for which, (owner, _) in models.items():
        step(which)
        step(which)
        errors[which] = relative_error(gradients(owner, x), reference)
    with record_solves() as solves:
        step("deq")
    times: dict[str, list[float]] = {which: [] for which in models}
    for _ in range(args.repeats):
        for which, series in times.items():
            series.append(step(which))
    medians = {which: statistics.median(series) for which, series in times.items()}
    return {
        "problem": name,
        "first_s": first,
        "ms": {which: 1e3 * median for which, median in medians.items()},
        "quartiles_ms": {which: [1e3 * edge for edge in machine.quartiles(series)] for which, series in times.items()},
        "ratio": medians["eager"] / medians["deq"],
        "gradient_error": errors,
        "solves": [
            {
                "status": str(record.status),
                "iterations": record.iterations,
                "vjps": record.vjps,
                "residual": record.residual,
                "adjoint_residual": record.adjoint_residual,
            }
            for record in solves
        ],
    }


def format_table(results: list[dict[str, Any]]) -> str:
    headers = ["problem", "eager loop (ms)", "deq (ms)", "ratio", "iterations", "VJPs", "gradient error: loop", "deq"]
    headers += ["status", "first call (s)"]
    lines = []
    for result in results:
        if "error" in result:
            lines.append([result["problem"], "failed", *[""] * (len(headers) - 2)])
            continue
        spread = {which: f"{low:.1f}–{high:.1f}" for which, (low, high) in result["quartiles_ms"].items()}
        solves = result["solves"]
        lines.append(
            [
                result["problem"],
                f"{result['ms']['eager']:.1f} ({spread['eager']})",
                f"{result['ms']['deq']:.1f} ({spread['deq']})",
                f"{result['ratio']:.2f}×",
                ", ".join(f"{solve['iterations']:.1f}" for solve in solves) or "–",
                ", ".join(str(solve["vjps"]) for solve in solves) or "–",
                f"{result['gradient_error']['eager']:.1e}",
                f"{result['gradient_error']['deq']:.1e}",
                ", ".join(solve["status"] for solve in solves) or "no region",
                f"{result['first_s']:.1f}",
            ]
        )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    names = list(problems.PROBLEMS) if args.problems == "all" else args.problems.split(",")
    unknown = [name for name in names if name not in problems.PROBLEMS]
    if unknown:
        raise SystemExit(f"--problems: expected some of {', '.join(problems.PROBLEMS)}; got {', '.join(unknown)}")
    torch.set_num_threads(args.threads)
    results: list[dict[str, Any]] = []
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            results.append(measure(name, args))
        except Exception:
            traceback.print_exc()
            results.append({"problem": name, "error": traceback.format_exc()})
    described = machine.describe()
    clock = "process CPU time" if args.threads == 1 else "wall time"
    print(f"\n{format_table(results)}\n")
    print(f"forward + backward, {clock}, median (quartiles) of {args.repeats}; loop of {args.loop}, x {args.inject} it")
    print(machine.one_line(described))
    if args.json:
        chosen = {"loop": args.loop, "inject": args.inject, "repeats": args.repeats, "options": args.options}
        text = json.dumps({"machine": described, "clock": clock, "settings": chosen, "results": results}, indent=1)
        args.json.write_text(text + "\n")
    return 1 if any("error" in result for result in results) else 0
