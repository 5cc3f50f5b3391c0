"""overhead: what a region costs beside its body, its products and the C++ solver, and what torch.compile costs around it.

The body is tanh(w z + x), so small that nearly all that is left is overhead. One thread, process CPU time, medians, microseconds.

    region    deq::solve and its backward, called as operators (no torch.compile around them), verified and warm. "over": what is
              left of a call when the time inside leaves is taken off (compiled body, products, C++ functions). Leaves are
              timed in calls of their own, by perf_counter, less what an empty leaf shows. All in turns.
    a + b k   least squares over the tolerances: a is what a call costs, b an iteration (k: evaluations, or products)
    step      forward, loss and backward of a model with that body in a loop of 30, under backend="deq"; "body": the same model
              with one evaluation, eager; "shell": step less the two calls: Dynamo's guards, AOTAutograd, autograd, the loss
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench import machine

from .tables.cli import header

SIZES = ((1, 8), (8, 8), (8, 64))
TOLERANCES = (0.3, 1e-2, 1e-4, 1e-6)


class Leaf:
    """A callable whose time is added up while `Leaf.on`."""

    on, seconds, calls = False, 0.0, 0

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        if not Leaf.on:
            return self.function(*args)
        begun = time.perf_counter()
        found = self.function(*args)
        Leaf.seconds += time.perf_counter() - begun
        Leaf.calls += 1
        return found


class Model(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.w, self.count = nn.Parameter(torch.linspace(-0.9, 0.9, width)), count

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.count):
            z = torch.tanh(self.w * z + x)
        return z


def time_leaves() -> None:
    """Wrap all leaves of regions that are compiled from here on."""
    from deq_compile.testing import Program, native

    finish = Program._finish
    Program._finish = lambda self, graph: Leaf(finish(self, graph))  # type: ignore[method-assign]
    for functions in (native._load() or {}).values():
        for name, function in vars(functions).items():
            setattr(functions, name, Leaf(function))


def taken(call: Callable[[], Any]) -> float:
    """Process CPU time, in seconds."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def inside(call: Callable[[], Any]) -> float:
    """Seconds in leaves."""
    empty = Leaf(lambda *args: None)
    Leaf.on, Leaf.seconds, Leaf.calls = True, 0.0, 0
    try:
        call()
        seconds, calls = Leaf.seconds, Leaf.calls
        Leaf.seconds = 0.0
        for _ in range(calls):
            empty(0, 0, 0, 0)
        return seconds - Leaf.seconds
    finally:
        Leaf.on = False


def region_calls(model: Model, x: Tensor, tol: float) -> tuple[Any, ...]:
    """The operator that the model is compiled to, with its arguments, and the whole step."""
    from deq_compile.testing import op

    torch._dynamo.reset()
    caught: list[Any] = []

    def remember(gm: Any, inputs: Any, **given: Any) -> Any:
        from deq_compile.testing import deq

        compiled = deq(gm, inputs, options={"tol": tol, "verify_tol": float("inf"), "backward_tol": tol})
        caught.extend(n.args[3] for n in gm.graph.nodes if n.target is op.solve_op)
        return compiled

    call = torch.compile(model, backend=remember)
    for _ in range(5):
        call(x).sum().backward()
    return call, caught[-1], op.solve_op


def measure(batch: int, width: int, tol: float, repeats: int) -> dict[str, Any]:
    from deq_compile import record_solves

    x, model = torch.randn(batch, width), Model(width, 30)
    x, w = (0.1 * x).requires_grad_(), model.w
    call, key, solve = region_calls(model, x, tol)
    z0, cotangent = torch.zeros_like(x), torch.ones_like(x)

    def forward() -> list[Tensor]:
        found: list[Tensor] = solve([z0], [w, x], [], key)
        return found

    def backward(out: list[Tensor]) -> Any:
        return torch.autograd.grad(out[0], (w, x), cotangent)

    def step(function: Callable[[Tensor], Tensor]) -> None:
        function(x).sum().backward()

    with record_solves() as solves:
        backward(forward())
    one_body = Model(width, 1)
    spent: dict[str, list[float]] = {name: [] for name in ("forward", "over", "backward", "back over", "step", "body", "shell")}
    gc.collect()
    for _ in range(repeats):  # in turns: the machine's speed changes
        ahead, back = taken(forward), taken(functools.partial(backward, forward()))
        leaves, back_leaves = inside(forward), inside(functools.partial(backward, forward()))
        whole, body = taken(lambda: step(call)), taken(lambda: step(one_body))
        found = (ahead, ahead - leaves, back, back - back_leaves, whole, body, whole - ahead - back)
        for name, seconds in zip(spent, found, strict=True):
            spent[name].append(seconds)
    counts = {"B x D": f"{batch} x {width}", "tol": tol, "evaluations": solves[0].evaluations, "products": solves[0].vjps}
    return counts | {name: statistics.median(values) for name, values in spent.items()}


def line(counts: list[float], seconds: list[float]) -> str:
    if len(set(counts)) < 2:
        return f"{1e6 * statistics.mean(seconds):.0f}"
    slope, start = statistics.linear_regression(counts, seconds)
    return f"{1e6 * start:.0f} + {1e6 * slope:.1f} k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=300, help="timed calls of each kind (default 300)")
    parser.add_argument("--json", type=Path, help="write everything there, in seconds, after each size")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    time_leaves()
    gc.disable()
    load = machine.OtherLoad()
    args.threads, done = 1, list[dict[str, Any]]()
    for batch, width in SIZES:
        rows = [measure(batch, width, tol, args.repeats) for tol in TOLERANCES]
        fixed = ("B x D", "tol", "evaluations", "products")
        print(tabulate([{k: v if k in fixed else f"{1e6 * v:.0f}" for k, v in row.items()} for row in rows], headers="keys"))
        for part, count, over in (("forward", "evaluations", "over"), ("backward", "products", "back over")):
            print(f"  {part}: {line([row[count] for row in rows], [row[over] for row in rows])}")
        print(flush=True)
        done += rows
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            found = {**header(args), "busy cores": load.mean_cores(), "rows": done}
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{machine.one_line(machine.describe())}; other programs kept {load.mean_cores():.1f} cores busy")
    return 0
